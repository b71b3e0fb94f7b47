"""The judge's side of the zygote and of each confined process: start, talk, bound, kill, and say how it ended."""

import mmap
import os
import select
import signal
import socket
import subprocess
import tempfile
import time

from wmtp.sandbox import confine, filesystem, wire
from wmtp.sandbox.jobs import Limits, Verdict
from wmtp.sandbox.usage import Usage, between, own_usage, starved

_START_SECONDS = 120.0  # a loaded machine may take long to start an interpreter
_CHUNK = 1 << 16
_FRAME_SLACK = 1 << 16  # tags, nonce and escapes around an answer of the size allowed
_MAX_CONTAINERS = 2_000_000  # each costs tens of bytes once parsed, whatever its size on the wire
_ANSWERS_PER_LIMIT = 4  # all answers of a program together, in units of the size of one
_LAST_WORDS = 4096  # bytes of output that are kept to tell what a program died of
_NEAR = 0.9  # of the memory limit: a fault there comes from memory that was refused
_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)

# In the flag: a byte has come from the program; it has ended, and what it left is being removed.
ANSWERED, ENDED = 1, 2
Flag = bytearray | mmap.mmap


class Failure(BaseException):
    """Why a program has not passed; raised where it can be talked to no more. Few tests would swallow a BaseException.

    `by_clock`: a loaded machine may be to blame.
    """

    def __init__(self, verdict: Verdict, detail: str, by_clock: bool = False) -> None:
        super().__init__(detail)
        self.verdict: Verdict = verdict
        self.detail = detail
        self.by_clock = by_clock

    @classmethod
    def raised(cls, text: str, refused_memory: bool, limits: Limits) -> "Failure":
        """Returns that of an exception, given as "type: message"; one for want of memory names the limit."""
        if refused_memory:
            return cls("memory", f"limits.memory_bytes is {limits.memory_bytes}: {text}")
        return cls("exception", text)

    def during(self, step: str) -> "Failure":
        """Returns the same with what was being done in the detail."""
        return Failure(self.verdict, f"{step}: {self.detail}", self.by_clock)


class Hangup(BaseException):
    """Nobody waits for the outcome any more."""


class ZygoteLost(Exception):
    """The zygote is gone or cannot start."""


def described(error: BaseException) -> str:
    """Returns type and message; the message may be an answer, and what comes of showing that is no verdict."""
    try:
        message = str(error)
    except (Hangup, ZygoteLost):
        raise
    except BaseException as again:
        message = f"<its message raised {type(again).__name__}>"
    return f"{type(error).__name__}: {message}".removesuffix(": ")


class ZygoteHandle:
    """A running zygote; raises `ZygoteLost` where it does not start.

    Args:
        settings: `without` (layers to leave out, each with the reason), `root` (folder in which to make the zygote's
            own), `hidden` (real paths of folders that no program may see), `outside` (a file that none may be able to
            read), `bubblewrap` (path of `bwrap`, or None: used where neither Landlock nor namespaces are to be had).
    """

    def __init__(self, settings: dict) -> None:
        self._base = tempfile.mkdtemp(prefix="zygote-", dir=settings["root"])
        self._start(settings)
        if "failed" in self.report:
            self.close()
            without = {**settings["without"], self.report["failed"]: self.report["reason"]}
            self._start(settings := {**settings, "without": without})
        apart = any(layer.startswith(("landlock", "namespaces")) for layer in self.report["layers"])
        if not apart and settings["bubblewrap"]:
            self.close()
            self._start(settings, wrapped=True)

    def _start(self, settings: dict, wrapped: bool = False) -> None:
        os.makedirs(self._base, exist_ok=True)
        here = {"base": self._base, "wrapped": wrapped, "address_space": confine.address_space()}
        prefix: tuple[str, ...] = ()
        if wrapped:
            prefix = settings["bubblewrap"], *filesystem.bubblewrap_options(self._base, settings["hidden"])
        self._started = wire.Started("zygote", {**settings, **here}, prefix=prefix, stderr=subprocess.PIPE)
        self.control, self._stderr = self._started.connection, self._started.process.stderr
        self.report = self._started.first_report(_START_SECONDS)
        if "error" in self.report:
            lines = self._stderr.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise ZygoteLost(f"the sandbox's zygote did not start: {lines[-1] if lines else self.report['error']}")

    def start(self, limits: Limits, descriptors: list[int]) -> None:
        """Asks for a process; its report is the next frame on `control`."""
        self._send({"limits": vars(limits)}, descriptors)

    def end(self) -> None:
        """Has the running process killed, or takes note that it ended."""
        self._send({"op": "end"}, [])

    def _send(self, message: dict, descriptors: list[int]) -> None:
        try:
            socket.send_fds(self.control, [wire.frame(message)], descriptors)
        except OSError as error:
            raise ZygoteLost(f"the zygote does not take requests: {error}") from error

    def read_report(self) -> dict:
        """Returns how the process ended."""
        report = wire.receive(self.control)
        if report is None:
            raise ZygoteLost("the zygote is gone")
        return report

    def close(self) -> None:
        """Ends the zygote, whatever runs under it, and its folder."""
        self.control.close()
        self._started.stop()
        self._stderr.close()
        filesystem.remove_folder(self._base)


class Process:
    """One confined process; raises `ZygoteLost` where it is not started.

    Args:
        limits: its limits; the wall clock starts when it is sent its program.
        stdin: descriptor to read from, where it runs as a program; None: it serves requests.
        hangup: descriptor whose far end closes when this judge is no longer wanted.
        flag: one byte, `ANSWERED` once a byte has come from the program. It may lie in shared memory, so that it can be
            read when an answer has brought the judge down.
    """

    def __init__(self, zygote: ZygoteHandle, limits: Limits, stdin: int | None, hangup: int, flag: Flag) -> None:
        self._zygote, self._hangup = zygote, hangup
        self.limits, self.flag = limits, flag
        self._has_program = False
        self.deadline = time.monotonic() + _START_SECONDS
        self.stdout = bytearray()
        self.report: dict = {}  # how it ended, once it has
        self.usage_at_start: Usage = {}  # of the confined process, as it says before it is given a program
        self._wall, self._own = 0.0, Usage()
        self._last_words = b""
        self._output_bytes = self._answer_bytes = 0
        self._inbox, self._outbox = bytearray(), b""
        self._channel, theirs = socket.socketpair()
        self._channel.setblocking(False)
        self._channel_open = True
        pipes = [os.pipe() for _ in range(1 if stdin is None else 2)]
        self._streams = [reader for reader, _ in pipes]
        descriptors = [theirs.fileno(), pipes[0][1], pipes[-1][1]] + ([] if stdin is None else [stdin])
        try:
            zygote.start(limits, descriptors)
        except ZygoteLost:
            self._close_descriptors()
            raise
        finally:
            theirs.close()
            for _, writer in pipes:
                os.close(writer)
        self._kept_stream = None if stdin is None else self._streams[0]  # stdout
        self._poll = select.poll()
        for source in (self._channel, zygote.control, *self._streams):
            self._poll.register(source, select.POLLIN)
        self._poll.register(hangup, 0)

    def send(self, message: dict) -> None:
        """Queues one frame; it goes out while waiting for the answer. The first brings the program."""
        if not self._has_program:
            self._has_program, self.deadline = True, time.monotonic() + self.limits.wall_seconds
            self._own = own_usage()
        self._outbox = wire.frame(message)
        self._write()

    def _write(self) -> None:
        try:
            self._outbox = self._outbox[self._channel.send(self._outbox) :]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):  # it died: reading tells how
            self._outbox = b""
        if self._channel_open:
            self._poll.modify(self._channel, select.POLLIN | (select.POLLOUT if self._outbox else 0))

    def receive(self) -> dict:
        """Returns the next frame; raises `Failure` where there is none, or it is too large or malformed."""
        while (message := self.take_frame()) is None:
            if not self._channel_open:
                self.wait()
                raise Failure("violation", "the program sent half a message") if self._inbox else self.ended()
            self._step()
        return message

    def wait(self) -> None:
        """Waits until the process has ended by itself, with all its output read; raises `Failure` at a limit."""
        while not self.report or self._streams or self._channel_open:
            self._step()

    def ended(self) -> Failure:
        """Returns the verdict on a process that ended without an answer; its report must be in."""
        report, limits = self.report, self.limits
        if "failed" in report:
            raise ZygoteLost(report["failed"])
        if (exceeded := self.exceeded()) is not None:
            return exceeded
        number = os.WTERMSIG(report["status"])  # of the signal, 0: none
        if number == signal.SIGKILL and report["cpu"] > 0.5 * limits.cpu_seconds:
            # The kernel kills on a count of timer ticks, which can run well ahead of the exact one that it reports.
            return _too_slow(limits)
        near = report["peak"] > _NEAR * limits.memory_bytes and number in _FAULTS
        if near or (number == signal.SIGABRT and b"bad_alloc" in self._last_words):
            return _too_large(limits)
        if number:
            verdict: Verdict = "violation" if number == signal.SIGSYS else "exception"
            return Failure(verdict, f"killed by {signal.Signals(number).name}")
        status = os.WEXITSTATUS(report["status"])
        return Failure("exception", f"the process exited with status {status} instead of returning")

    def exceeded(self) -> Failure | None:
        """Returns the verdict on an ended process that used more than it may, whatever else is known of it."""
        if self.report.get("swollen"):
            return _too_large(self.limits)
        return _too_slow(self.limits) if self.report.get("cpu", 0.0) >= self.limits.cpu_seconds else None

    def starved(self) -> bool:
        """Returns whether the closed process, or this judge, was kept from running for want of a CPU or a disk."""
        if not self._has_program or "cpu" not in self.report:
            return False
        return starved(self._wall, between(self.usage_at_start, self.report), between(self._own, own_usage()))

    def close(self) -> None:
        """Kills the process where it still runs and takes its report; raises `ZygoteLost`."""
        try:
            self._wall = time.monotonic() - (self.deadline - self.limits.wall_seconds)
            if self._has_program:  # should this judge be given up while what it left is removed, that is its doing
                self.flag[0] |= ENDED
            self._zygote.end()
            if not self.report:
                self.report = self._zygote.read_report()
        finally:
            self._close_descriptors()

    def unasked(self) -> bool:
        """Returns whether the program said more than it was asked for."""
        try:
            if not self._inbox and self._channel_open:
                self._read_channel()
        except Failure:  # more than it may say at all
            return True
        return bool(self._inbox)

    def _close_descriptors(self) -> None:
        self._channel.close()
        while self._streams:
            os.close(self._streams.pop())

    def _step(self) -> None:
        events = self._poll.poll(1000 * max(0, self.deadline - time.monotonic()))
        if not events:
            seconds = self.limits.wall_seconds if self._has_program else _START_SECONDS
            raise Failure("timeout", f"no end after {seconds:g} s by the clock", by_clock=True)
        for descriptor, event in events:
            if descriptor == self._channel.fileno():
                if event & select.POLLOUT:
                    self._write()
                if event & ~select.POLLOUT:
                    self._read_channel()
            elif descriptor == self._zygote.control.fileno():
                self.report = self._zygote.read_report()
                self._poll.unregister(descriptor)
            elif descriptor == self._hangup:
                raise Hangup
            else:
                self._read_stream(descriptor)

    def _read_channel(self) -> None:
        try:
            data = self._channel.recv(_CHUNK)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._channel_open = False
            self._poll.unregister(self._channel)
        elif self._has_program:
            self.flag[0] = ANSWERED
        self._inbox += data
        self._answer_bytes += len(data)
        if self._answer_bytes > _ANSWERS_PER_LIMIT * self.limits.output_bytes + _FRAME_SLACK:
            raise Failure("output_limit", "the answers together are too large")

    def _read_stream(self, descriptor: int) -> None:
        data = os.read(descriptor, _CHUNK)
        if not data:
            self._poll.unregister(descriptor)
            self._streams.remove(descriptor)
            os.close(descriptor)
            return
        self._output_bytes += len(data)
        self._last_words = (self._last_words + data)[-_LAST_WORDS:]
        if self._has_program:
            self.flag[0] = ANSWERED
        if descriptor == self._kept_stream:
            self.stdout += data
        if self._output_bytes > self.limits.output_bytes:
            raise Failure("output_limit", f"more than {self.limits.output_bytes} bytes of output")

    def take_frame(self) -> dict | None:
        """Returns the next frame that has come in whole, if any."""
        if len(self._inbox) < wire.HEADER_BYTES:
            return None
        size = int.from_bytes(self._inbox[: wire.HEADER_BYTES], "big")
        if size > self.limits.output_bytes + _FRAME_SLACK:
            raise Failure("output_limit", f"an answer of {size} bytes, more than {self.limits.output_bytes}")
        end = wire.HEADER_BYTES + size
        if len(self._inbox) < end:
            return None
        payload = bytes(self._inbox[wire.HEADER_BYTES : end])
        del self._inbox[:end]
        if payload.count(b"[") + payload.count(b"{") > _MAX_CONTAINERS:
            raise Failure("output_limit", f"an answer with more than {_MAX_CONTAINERS} lists or dicts")
        try:
            message = wire.parse(payload)
        except (ValueError, RecursionError):
            raise Failure("violation", "the program sent what is no JSON") from None
        except MemoryError:
            raise Failure("memory", "the judge ran out of memory on the program's answer") from None
        if type(message) is not dict:
            raise Failure("violation", "the program sent what is no message")
        return message


def _too_slow(limits: Limits) -> Failure:
    return Failure("timeout", f"more than {limits.cpu_seconds:g} s of CPU time")


def _too_large(limits: Limits) -> Failure:
    return Failure("memory", f"more than {limits.memory_bytes} bytes of memory (limits.memory_bytes)")
