"""The thread that sends a run's records in order and tries again until the store has them."""

import threading
import time
from collections.abc import Callable

from wmtp.errors import UserError, one_line
from wmtp.tracking.delivery import Delivery, Refused, deliver
from wmtp.tracking.spool import Spool

_SECONDS_BETWEEN_BATCHES = 1.0
_LONGEST_WAIT = 60.0  # of the back-off: 1, 2, 4, ... seconds
_LONGEST_WAIT_AT_END = 2.0
_UPLOAD_BYTES_PER_SECOND = 10e6  # close() gives up on slower uploads


class Sender:
    """A thread that sends a run's records and survives every failure of the store, of which `log` is told.

    To make one, and to start it, waits until the store has answered or failed, at most `seconds`; a refusal is raised.
    """

    def __init__(self, delivery: Delivery, log: Callable[[str], None], seconds: float) -> None:
        self._delivery, self._log, self._seconds = delivery, log, seconds
        self._spool: Spool | None = None
        self._changed = threading.Condition()
        self._connected = self._opened = self._idle = self._closing = self._stopped = False
        self._awaited = True  # the run has not begun: a refusal can still stop it
        self._refused: str | None = None
        self.failure: str | None = None  # of the last try
        self._last_success = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()
        self._wait(lambda: self._connected)

    def start(self, spool: Spool) -> None:
        """Opens the run and begins to send its records."""
        with self._changed:
            self._spool = spool
            self._changed.notify_all()
        self._wait(lambda: self._opened)
        self._awaited = False

    def _wait(self, reached: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: reached() or self._refused or self.failure, self._seconds)
            if self._refused:
                raise UserError(self._refused)

    def close(self, seconds: float) -> int:
        """Sends the remaining records until nothing is accepted for so many seconds. Returns how many are unsent."""
        with self._changed:
            self._closing, self._idle = True, False
            self._last_success = time.monotonic()
            self._changed.notify_all()
            while not self._idle and self._thread.is_alive():
                left = self._last_success + seconds + self._seconds_of_uploads() - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, 1.0))
        self.stop()
        return self._spool.close()

    def stop(self) -> None:
        """Ends the thread, at once or after the request that is under way."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _seconds_of_uploads(self) -> float:
        """Returns the extra seconds that the artifact under way may take: its upload reports no progress."""
        waiting = self._spool.unsent(1)
        if not waiting or waiting[0][0]["kind"] != "artifact" or self.failure:
            return 0.0
        path = self._spool.output_dir / waiting[0][0]["path"]
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files if file.is_file()) / _UPLOAD_BYTES_PER_SECOND

    # ------------------------------------------------------------------------------------------------------------------
    # In the thread

    def _work(self) -> None:
        delay = 0.0
        while not self._stopped:
            try:
                if not self._connected:
                    self._delivery.connect()
                    self._succeeded("_connected")
                elif self._spool is None:
                    with self._changed:
                        self._changed.wait_for(lambda: self._spool is not None or self._stopped)
                    continue
                elif not self._opened:
                    self._spool.set_run(run_id=self._delivery.open_run())
                    self._succeeded("_opened")
                elif deliver(self._spool, self._delivery):
                    self._succeeded()
                    if not self._closing:
                        self._sleep(_SECONDS_BETWEEN_BATCHES)
                else:
                    self._succeeded("_idle")
                    self._sleep(_SECONDS_BETWEEN_BATCHES)
                delay = 0.0
            except Refused as error:
                if self._awaited:
                    with self._changed:
                        self._refused = str(error)
                        self._changed.notify_all()
                    return
                delay = self._failed(error, delay)
            except Exception as error:  # mlflow and each kind of store raise errors of their own
                delay = self._failed(error, delay)

    def _succeeded(self, reached: str | None = None) -> None:
        with self._changed:
            if self.failure and self._connected:
                self._log("tracking: the store answers again")
                self.failure = None
            self._last_success = time.monotonic()
            if reached == "_idle":
                self._idle = not self._spool.unsent(1)
            elif reached:
                setattr(self, reached, True)
            self._changed.notify_all()

    def _failed(self, error: Exception, delay: float) -> float:
        if self._stopped:
            return delay
        delay = min(max(1.0, 2 * delay), _LONGEST_WAIT)
        with self._changed:
            if self.failure is None and not self._closing:
                self._log(
                    f"tracking: the store does not take what it is sent ({one_line(error):.300}); the run goes on, all "
                    "is kept in its tracking_spool and sent again"
                )
            self.failure = f"{one_line(error):.300}"
            self._changed.notify_all()
        self._sleep(delay)
        return delay

    def _sleep(self, seconds: float) -> None:
        with self._changed:
            if self._closing:
                seconds = min(seconds, _LONGEST_WAIT_AT_END)
            if not (self._closing and self._idle):
                self._changed.wait_for(lambda: self._stopped or (self._closing and not self._idle), seconds)
