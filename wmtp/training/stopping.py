"""Ending a run early so that it can go on: on SIGTERM, SIGINT (Ctrl-C) or after max_minutes.

In a training loop a signal is a flag: all ranks agree on it in the step's own collective, finish that step, save, and
leave. Anywhere else it ends the process at once, since nothing is lost that was not saved. A second signal, from a
second after the first on, is the kernel's: it kills, whatever the process is waiting for, also in C, where Python's
handlers do not run.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from wmtp.distributed import SharedCounters, a_rank_failed, gather_objects, tell_failure, wait_for_all
from wmtp.errors import Stopped

_SECONDS_ONE_SIGNAL = 1.0  # a launcher passes on what its workers were sent too: that is one signal, not two
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_seen: str | None = None  # the signal that came
_flagged = False  # it is asked for, rather than ending the process where it is
_resumes = True  # the recipe can go on with what it saved
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not its parent's


class StopFlag:
    """Whether a run is to end early, and what all ranks have agreed on.

    Args:
        max_minutes: how long the run may take, from now on; None for no limit.

    Attributes:
        agreed: that the loop ends after this step, or part: the same on every rank.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._until = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._limit = f"max_minutes={max_minutes:g}" if max_minutes is not None else None
        self.agreed = False

    def wanted(self) -> bool:
        """Returns whether this rank wants to end. From the first question on a signal waits to be asked for."""
        global _flagged
        _flagged = True
        return self._reason() is not None

    def agree(self, ranks: float) -> None:
        """Takes what a collective found: how many ranks want to end."""
        self.agreed = self.agreed or ranks > 0

    def ask_all(self) -> None:
        """Agrees in a collective of its own, after work that takes longer than a step; every rank calls it."""
        self.agree(sum(gather_objects(self.wanted())))

    def wanted_by_any(self, counters: SharedCounters) -> bool:
        """Returns whether a rank wants to end, as far as it has been asked; for ranks that do not work in step."""
        if self.wanted():
            counters.add("stop", 1)
        return counters.add("stop") > 0

    def end(self, where: str) -> None:
        """Ends a stopped run after the loop, when all is saved: every rank calls it.

        Args:
            where: ``after step 40 of 100``, for the line.

        Raises:
            Stopped: on every rank, if any wanted to end.
        """
        global _flagged
        reasons = [reason for reason in gather_objects(self._reason()) if reason is not None]
        _flagged = False
        if self.agreed or reasons:
            why = reasons[0] if reasons else "a signal"
            raise Stopped(
                f"stopped by {why} {where}, and saved; to go on: the same command with resume=true", agreed=True
            )

    def _reason(self) -> str | None:
        if _seen is not None:
            return _seen
        return self._limit if self._until is not None and time.monotonic() >= self._until else None


@contextmanager
def stopping(*, resumes: bool = True) -> Iterator[None]:
    """Surrounds a recipe: the first SIGTERM or SIGINT ends it in order, with one line and the exit status 75.

    Args:
        resumes: whether the recipe can go on with what it saved; else the status is 128 and the signal's number.

    Raises:
        Stopped: a signal came, or the recipe's :class:`StopFlag` said so.
    """
    global _seen, _flagged, _resumes
    _seen, _flagged, _resumes = None, False, resumes
    # What is ignored stays so: a shell starts background jobs with SIGINT ignored.
    handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _on_signal) for number in handled}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # written to by the C handler, at once
    ended = threading.Event()
    threading.Thread(
        target=_let_the_second_kill, args=(reading, handled, ended), name="second-signal", daemon=True
    ).start()
    try:
        yield
    except Stopped as stopped:
        if stopped.agreed:
            wait_for_all()  # the launcher ends all ranks when the first one has ended
        raise
    except BaseException:
        tell_failure()
        raise
    finally:
        ended.set()
        signal.set_wakeup_fd(woken)
        os.close(writing)
        for number, handler in before.items():
            signal.signal(number, handler)


class _Ended(Stopped):
    """The end of a rank, silent, because another one failed."""

    exit_status = 1


def _on_signal(number: int, frame: object) -> None:
    global _seen
    if _seen is not None:
        return  # the same one, told twice
    _seen = signal.Signals(number).name
    if a_rank_failed():  # then it is the launcher's, which ends us: the error is said elsewhere
        raise _Ended("")
    if not _flagged:
        how = "; to go on from what is saved: the same command with resume=auto" if _resumes else ""
        stopped = Stopped(f"stopped by {_seen}{how}")
        if not _resumes:
            stopped.exit_status = 128 + number
        raise stopped
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{_seen}: stopping after this step; a second signal ends it at once\n".encode())


def _let_the_second_kill(reading: int, handled: list[signal.Signals], ended: threading.Event) -> None:
    with os.fdopen(reading, "rb", 0) as signals:
        while (told := signals.read(1)) and told[0] not in handled:
            pass
    if told and not ended.wait(_SECONDS_ONE_SIGNAL):
        for number in handled:  # the kernel's default, through libc: Python sets it in the main thread only
            ctypes.CDLL(None).signal(int(number), ctypes.c_void_p(None))
