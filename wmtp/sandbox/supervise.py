"""The judge's side of the zygote and of each confined process: start, talk, bound, kill, and say how it ended."""

import json
import mmap
import os
import select
import signal
import socket
import subprocess
import tempfile
import time

from wmtp.sandbox import confine, filesystem, wire
from wmtp.sandbox.interpreter import clean_environment, python_command
from wmtp.sandbox.jobs import Limits, Verdict
from wmtp.sandbox.usage import Usage, between, own_usage, starved

_START_SECONDS = 120.0  # a loaded machine may take long to start an interpreter
_CHUNK = 1 << 16
_FRAME_SLACK = 1 << 16  # tags, nonce and escapes around an answer of the size allowed
_MAX_CONTAINERS = 2_000_000  # each costs tens of bytes once parsed, whatever its size on the wire
_ANSWERS_PER_LIMIT = 4  # all answers of a program together, in units of the size of one
_LAST_WORDS = 4096  # bytes of output that are kept to tell what a program died of
_NEAR = 0.9  # of the memory limit: a fault there comes from memory that was refused


class Ended(BaseException):
    """The program can be talked to no more; carries the verdict. A BaseException, which few tests would swallow."""

    def __init__(self, verdict: Verdict, detail: str, by_clock: bool = False) -> None:
        super().__init__(detail)
        self.verdict: Verdict = verdict
        self.detail = detail
        self.by_clock = by_clock  # a loaded machine may be to blame


class Hangup(BaseException):
    """Nobody waits for the outcome any more."""


class ZygoteLost(Exception):
    """The zygote is gone or cannot start."""


class ZygoteHandle:
    """A running zygote.

    Args:
        without: layers to leave out, each with the reason.
        root: folder in which to make the zygote's own.
        hidden: real paths of folders that no program may see, wherever they lie.
        outside: a file that no program may be able to read.
        bubblewrap: path of `bwrap`, which is used where neither Landlock nor namespaces are to be had, or None.

    Raises:
        ZygoteLost: it did not start.
    """

    def __init__(
        self, without: dict[str, str], root: str, hidden: list[str], outside: str, bubblewrap: str | None
    ) -> None:
        self.base = tempfile.mkdtemp(prefix="zygote-", dir=root)
        self._hidden, self._outside, self._bubblewrap = hidden, outside, bubblewrap
        self.report = self._start(without, wrapped=False)
        if "failed" in self.report:
            without = {**without, self.report["failed"]: self.report["reason"]}
            self.close()
            self.report = self._start(without, wrapped=False)
        apart = any(layer.startswith(("landlock", "namespaces")) for layer in self.report["layers"])
        if not apart and bubblewrap:
            self.close()
            self.report = self._start(without, wrapped=True)

    def _start(self, without: dict[str, str], wrapped: bool) -> dict:
        os.makedirs(self.base, exist_ok=True)
        self.control, theirs = socket.socketpair()
        settings = {"control": theirs.fileno(), "base": self.base, "without": without, "outside": self._outside}
        settings |= {"hidden": self._hidden, "wrapped": wrapped, "address_space": confine.address_space()}
        command = python_command("zygote", json.dumps(settings))
        if wrapped:
            command = [self._bubblewrap, *filesystem.bubblewrap_options(self.base, self._hidden), *command]
        with theirs:
            self._process = subprocess.Popen(
                command,
                env=clean_environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
        self.control.settimeout(_START_SECONDS)
        try:
            report = wire.receive(self.control)
        except OSError as error:
            report = None
            self._process.kill()
            reason = f"no answer: {error}"
        else:
            reason = "it ended"
        if report is None:
            lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise ZygoteLost(f"the sandbox's zygote did not start: {lines[-1] if lines else reason}")
        self.control.settimeout(None)
        return report

    def start(self, mode: str, limits: Limits, descriptors: list[int]) -> None:
        """Ask for a process; its report is the next frame on `control`."""
        message = wire.frame({"mode": mode, "limits": vars(limits)})
        try:
            socket.send_fds(self.control, [message], descriptors)
        except OSError as error:
            raise ZygoteLost(f"the zygote does not take requests: {error}") from error

    def end(self) -> None:
        """Have the running process killed, or take note that it ended."""
        try:
            wire.send(self.control, {"op": "end"})
        except OSError as error:
            raise ZygoteLost(f"the zygote does not take requests: {error}") from error

    def read_report(self) -> dict:
        """How the process ended."""
        report = wire.receive(self.control)
        if report is None:
            raise ZygoteLost("the zygote is gone")
        return report

    def close(self) -> None:
        """End the zygote, whatever runs under it, and its folder."""
        self.control.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stderr.close()
        if os.path.isdir(self.base):
            filesystem.clear_folder(self.base)
            os.rmdir(self.base)


class Process:
    """One confined process.

    Args:
        zygote: who forks it.
        mode: `assertion` (serves requests) or `stdio` (runs as a program).
        limits: its limits; the wall clock starts when it is sent its program.
        stdin: descriptor to read from, or None for an empty input.
        hangup: descriptor whose far end closes when this judge is no longer wanted.

    Raises:
        ZygoteLost: the process was not started.
    """

    def __init__(self, zygote: ZygoteHandle, mode: str, limits: Limits, stdin: int | None, hangup: int) -> None:
        self._zygote, self.limits = zygote, limits
        self._has_program = False
        self.deadline = time.monotonic() + _START_SECONDS
        self.stdout = bytearray()
        self.report: dict | None = None
        self._keep_stdout = mode == "stdio"
        self._last_words = b""
        self._wall = 0.0
        self.usage_at_start: Usage = {}  # of the confined process, as it says before it is given a program
        self._output_bytes = self._answer_bytes = 0
        self._inbox, self._outbox = bytearray(), b""
        self.flag: bytearray | mmap.mmap = bytearray(1)  # set to 1 as soon as anything comes from the program
        self._channel, theirs = socket.socketpair()
        self._channel.setblocking(False)
        self._streams: list[int] = []
        self._poll = select.poll()
        writers = [self._pipe() for _ in range(2 if self._keep_stdout else 1)]
        self._stdout_stream = self._streams[0]
        descriptors = [theirs.fileno(), writers[0], writers[-1]] + ([] if stdin is None else [stdin])
        try:
            zygote.start(mode, limits, descriptors)
        except ZygoteLost:
            self._close_descriptors()
            raise
        finally:
            theirs.close()
            for writer in writers:
                os.close(writer)
        self._poll.register(self._channel, select.POLLIN)
        self._poll.register(zygote.control, select.POLLIN)
        self._poll.register(hangup, 0)
        self._hangup = hangup
        self._channel_open = True

    def _pipe(self) -> int:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self._streams.append(reader)
        self._poll.register(reader, select.POLLIN)
        return writer

    def send(self, message: dict) -> None:
        """Queue one frame; it goes out while waiting for the answer. The first brings the program."""
        if not self._has_program:
            self._has_program, self.deadline = True, time.monotonic() + self.limits.wall_seconds
            self._own = own_usage()
        self._outbox = wire.frame(message)
        self._write()
        if self._outbox:
            self._poll.modify(self._channel, select.POLLIN | select.POLLOUT)

    def _write(self) -> None:
        try:
            sent = self._channel.send(self._outbox)
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):  # it died: reading tells how
            sent = len(self._outbox)
        self._outbox = self._outbox[sent:]

    def receive(self) -> dict:
        """The next frame; raises `Ended` where there is none, or it is too large or malformed."""
        while True:
            message = self.take_frame()
            if message is not None:
                return message
            if not self._channel_open:
                self.wait()
                raise Ended("violation", "the program sent half a message") if self._inbox else self.ended()
            self._step()

    def wait(self) -> None:
        """Until the process has ended by itself, with all its output read; raises `Ended` at a limit."""
        while self.report is None or self._streams or self._channel_open:
            self._step()

    def ended(self) -> Ended:
        """The verdict on a process that ended without an answer; its report must be in."""
        report = self.report
        if "failed" in report:
            raise ZygoteLost(report["failed"])
        exceeded = self.exceeded()
        if exceeded is not None:
            return exceeded
        status = report["status"]
        killed = os.WIFSIGNALED(status)
        number = os.WTERMSIG(status)
        # The kernel kills on a count of timer ticks, which can run well ahead of the exact one that it reports.
        if number == signal.SIGKILL and report["cpu"] > 0.5 * self.limits.cpu_seconds:
            return self._ended_by("cpu_seconds")
        if self._broke_on_memory(number if killed else 0):
            return self._ended_by("memory_bytes")
        if killed:
            verdict: Verdict = "violation" if number == signal.SIGSYS else "exception"
            return Ended(verdict, f"killed by {signal.Signals(number).name}")
        return Ended("exception", f"the process exited with status {os.WEXITSTATUS(status)} instead of returning")

    def starved(self) -> bool:
        """Whether the closed process, or this judge, was kept from running for want of a CPU or a disk."""
        if not self._has_program or "cpu" not in self.report:
            return False
        usages = between(self.usage_at_start, self.report), between(self._own, own_usage())
        return starved(self._wall, *usages)

    def exceeded(self) -> Ended | None:
        """The verdict on an ended process that used more than it may, whatever else is known of it."""
        report = self.report or {}
        if report.get("swollen"):
            return self._ended_by("memory_bytes")
        return self._ended_by("cpu_seconds") if report.get("cpu", 0.0) >= self.limits.cpu_seconds else None

    def _ended_by(self, limit: str) -> Ended:
        if limit == "cpu_seconds":
            return Ended("timeout", f"more than {self.limits.cpu_seconds:g} s of CPU time")
        return Ended("memory", f"more than {self.limits.memory_bytes} bytes of memory (limits.memory_bytes)")

    def _broke_on_memory(self, number: int) -> bool:
        """Whether the signal (0: none) that the process died of is that of a program that was refused memory."""
        near = self.report["peak"] > _NEAR * self.limits.memory_bytes
        if number == signal.SIGABRT and b"bad_alloc" in self._last_words:
            return True
        return near and number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)

    def close(self) -> None:
        """Kill the process where it still runs and take its report; raises `ZygoteLost`."""
        try:
            self._wall = time.monotonic() - (self.deadline - self.limits.wall_seconds)
            self._zygote.end()
            if self.report is None:
                self.report = self._zygote.read_report()
        finally:
            self._close_descriptors()

    def unasked(self) -> bool:
        """Whether the program said more than it was asked for."""
        if not self._inbox and self._channel_open:
            self._read_channel()
        return bool(self._inbox)

    def _close_descriptors(self) -> None:
        self._channel.close()
        for stream in self._streams:
            os.close(stream)
        self._streams = []

    def _step(self) -> None:
        """Wait for the next event and take it in."""
        left = self.deadline - time.monotonic()
        events = self._poll.poll(max(0, left) * 1000)
        if not events:
            seconds = self.limits.wall_seconds if self._has_program else _START_SECONDS
            raise Ended("timeout", f"no end after {seconds:g} s by the clock", by_clock=True)
        channel = self._channel.fileno()
        for descriptor, event in events:
            if descriptor == channel:
                if event & select.POLLOUT:
                    self._write()
                    if not self._outbox:
                        self._poll.modify(channel, select.POLLIN)
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
        if data and self._has_program:
            self.flag[0] = 1
        self._inbox += data
        self._answer_bytes += len(data)
        if self._answer_bytes > _ANSWERS_PER_LIMIT * self.limits.output_bytes + _FRAME_SLACK:
            raise Ended("output_limit", "the answers together are too large")

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
            self.flag[0] = 1
        if self._keep_stdout and descriptor == self._stdout_stream:
            self.stdout += data
        if self._output_bytes > self.limits.output_bytes:
            raise Ended("output_limit", f"more than {self.limits.output_bytes} bytes of output")

    def _take_header(self) -> int:
        size = int.from_bytes(self._inbox[: wire.HEADER_BYTES], "big")
        if size > self.limits.output_bytes + _FRAME_SLACK:
            raise Ended("output_limit", f"an answer of {size} bytes, more than {self.limits.output_bytes}")
        return size

    def take_frame(self) -> dict | None:
        """The next frame that has come in whole, if any."""
        if len(self._inbox) < wire.HEADER_BYTES:
            return None
        end = wire.HEADER_BYTES + self._take_header()
        if len(self._inbox) < end:
            return None
        payload = bytes(self._inbox[wire.HEADER_BYTES : end])
        del self._inbox[:end]
        if payload.count(b"[") + payload.count(b"{") > _MAX_CONTAINERS:
            raise Ended("output_limit", f"an answer with more than {_MAX_CONTAINERS} lists or dicts")
        try:
            message = wire.parse(payload)
        except (ValueError, RecursionError):
            raise Ended("violation", "the program sent what is no JSON") from None
        except MemoryError:
            raise Ended("memory", "the judge ran out of memory on the program's answer") from None
        if type(message) is not dict:
            raise Ended("violation", "the program sent what is no message")
        return message
