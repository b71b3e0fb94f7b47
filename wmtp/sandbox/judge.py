"""The judge: a process that alone knows the expected values, and runs the trusted tests itself.

It has one zygote. Jobs come in and outcomes go out on a socket to the caller's process, one at a time.
"""

import contextlib
import mmap
import os
import resource
import socket
import sys
import tempfile
import time
from dataclasses import asdict

from wmtp.sandbox import compare, confine, filesystem, wire
from wmtp.sandbox.assertions import judge_inside, judge_outside
from wmtp.sandbox.jobs import AssertionJob, Job, Outcome, StdioTest, Verdict, job_from_wire
from wmtp.sandbox.names import TEST_MODULE
from wmtp.sandbox.session import Session
from wmtp.sandbox.supervise import ANSWERED, Ended, Hangup, Process, ZygoteHandle, ZygoteLost

_MAX_DETAIL = 300
_OWN_MEMORY_BYTES = 1 << 30  # an answer must not make a test eat the machine
_MAX_DIGITS = 100_000  # of an integer that a test turns into a string: bounded, because that takes quadratic time


def main(connection: socket.socket, settings: dict) -> None:
    """Runs the process until the caller's process says so or is gone; settings as `Judge` takes them, and `flag`."""
    sys.set_int_max_str_digits(_MAX_DIGITS)
    if space := confine.address_space():
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = space + _OWN_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    judge = Judge(settings, connection.fileno(), mmap.mmap(settings["flag"], 1))
    abandoned = True
    try:
        _serve(connection, judge)
        abandoned = False
    except (Hangup, BrokenPipeError, ConnectionResetError):
        pass  # the caller's process is gone
    finally:
        judge.close()
        if abandoned:  # remove what the caller would have; the last judge to leave removes the folder of all
            filesystem.remove_folder(settings["root"])
            with contextlib.suppress(OSError):
                os.remove(settings["outside"])
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(settings["outside"]))


def _serve(connection: socket.socket, judge: "Judge") -> None:
    """Judges what comes in until told to close; raises `Hangup` where the caller is gone."""
    try:
        report = judge.report()
    except ZygoteLost as error:
        wire.send(connection, {"error": str(error)})
        return
    wire.send(connection, report)
    while (message := wire.receive(connection)) is not None:
        if message["kind"] == "close":
            return
        outcome, starved = judge.judge(job_from_wire(message))
        wire.send(connection, {"outcome": asdict(outcome), "starved": starved})
    raise Hangup


class Judge:
    """Judges jobs one at a time.

    Args:
        settings: `floor` (whether to insist on it), and those of `ZygoteHandle`.
        hangup: descriptor whose far end closes when the judge is no longer wanted.
        flag: one byte, as `Session` takes it.
    """

    def __init__(self, settings: dict, hangup: int, flag: bytearray | mmap.mmap) -> None:
        self._settings = settings
        self._flag = flag
        self._hangup = hangup
        self._zygote: ZygoteHandle | None = None

    def _ready_zygote(self) -> ZygoteHandle:
        if self._zygote is None:
            self._zygote = ZygoteHandle(self._settings)
        return self._zygote

    def report(self) -> dict:
        """Returns the zygote's report of its protections."""
        return self._ready_zygote().report

    def close(self) -> None:
        """Ends the zygote."""
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None

    def judge(self, job: Job) -> tuple[Outcome, bool]:
        """Returns the outcome of `job`, and whether the machine is to blame for a timeout by the clock.

        A zygote that was disturbed is replaced; the job is then a harness error.
        """
        start = time.monotonic()
        self._flag[0] = 0
        run = _Run(job, self._hangup, self._flag)
        try:
            zygote = self._ready_zygote()
            if self._settings["floor"] and not zygote.report["floor"]:  # a replaced zygote may have got less
                raise ZygoteLost(f"the zygote lacks protections: {'; '.join(zygote.report['missing'])}")
            verdict, detail = run.assertions(zygote) if isinstance(job, AssertionJob) else run.stdio(zygote)
        except ZygoteLost as error:
            self.close()
            verdict, detail = "violation" if self._flag[0] & ANSWERED else "harness_error", str(error)
            run.tests.append(verdict)
        wall = time.monotonic() - start
        outcome = Outcome(verdict, _one_line(detail), tuple(run.tests), tuple(run.lenient), run.cpu_seconds, wall)
        return outcome, verdict == "timeout" and run.starved


class _Run:
    """One job's judging: what has been found so far."""

    def __init__(self, job: Job, hangup: int, flag: bytearray | mmap.mmap) -> None:
        self.job = job
        self._flag = flag
        self.tests: list[Verdict] = []
        self.lenient: list[bool] = []
        self.cpu_seconds = 0.0
        self.starved = False  # late by the clock, and for want of a CPU
        self._hangup = hangup

    def assertions(self, zygote: ZygoteHandle) -> tuple[Verdict, str]:
        """Judges an `AssertionJob`."""
        mode, judge = ("inside", judge_inside) if self.job.inside else ("assertion", judge_outside)
        process = Process(zygote, mode, self.job.limits, None, self._hangup)
        session = Session(process, TEST_MODULE, self._flag)
        try:
            _await_ready(process)
            verdict, detail, by_clock = judge(self.job, session, self.tests)
        finally:
            spoke = session.failure is None and process.unasked()
            process.close()
            self.cpu_seconds = process.report.get("cpu", 0.0)
        self.starved = by_clock and process.starved()
        if verdict == "passed" and spoke:
            verdict, detail = "violation", "the program sent an answer that was not asked for"
        exceeded = process.exceeded()
        if verdict == "passed" and exceeded is not None:
            verdict, detail = exceeded.verdict, exceeded.detail
        if verdict != "passed" and self.tests[-1:] in ([], ["passed"]):
            self.tests[-1:] = [verdict]
        return verdict, detail

    def stdio(self, zygote: ZygoteHandle) -> tuple[Verdict, str]:
        """Judges a `StdioJob`."""
        first: tuple[Verdict, str] = ("passed", "")
        for index, test in enumerate(self.job.tests):
            verdict, detail, lenient = self._stdio_test(zygote, test)
            self.tests.append(verdict)
            self.lenient.append(lenient)
            if verdict != "passed" and first[0] == "passed":
                first = (verdict, f"test {index}: {detail}")
                if self.job.stop_at_first_failure:
                    break
        return first

    def _stdio_test(self, zygote: ZygoteHandle, test: StdioTest) -> tuple[Verdict, str, bool]:
        with _input_file(test.input) as stdin:
            process = Process(zygote, "stdio", self.job.limits, stdin.fileno(), self._hangup)
        self._flag[0], process.flag = 0, self._flag
        failure = None
        try:
            _await_ready(process)
            process.send({"program": self.job.program})
            failure = _stdio_failure(process)
        except Ended as end:
            failure = end
        finally:
            process.close()
            self.cpu_seconds += process.report.get("cpu", 0.0)
        failure = process.exceeded() or failure
        if failure is not None:
            self.starved = self.starved or (failure.by_clock and process.starved())
            return failure.verdict, failure.detail, False
        output, expected = bytes(process.stdout), test.output.encode("utf-8", "surrogatepass")
        try:
            lenient = compare.lenient_match(output, expected)
            if compare.exact_match(output, expected):
                return "passed", "", lenient
            return "wrong_answer", compare.difference(output, expected), lenient
        except MemoryError:
            return "memory", "the judge ran out of memory on the program's output", False


def _await_ready(process: Process) -> None:
    """Takes the first message, which is from before the program is read: it can be trusted, and a failure is ours."""
    try:
        message = process.receive()
    except Ended as end:
        raise ZygoteLost(f"the process did not start: {end.detail}") from None
    if "ready" not in message:
        raise ZygoteLost(str(message.get("fatal", "the process did not start")))
    process.usage_at_start = message["ready"]


def _stdio_failure(process: Process) -> Ended | None:
    """Waits for the program's end: what went wrong, if anything did. The verdict rests on stdout, not on this."""
    process.wait()
    message = process.take_frame()
    if message is not None and type(message.get("done")) is dict:
        error = message["done"]
        bases = error.get("bases")
        verdict: Verdict = "memory" if type(bases) is list and "MemoryError" in bases else "exception"
        return Ended(verdict, f"{error.get('type')}: {error.get('message')}")
    return process.ended() if process.report.get("status") != 0 else None


def _input_file(text: str):
    """Returns a regular file to read from: programs ask for its size, read its descriptor, or open it again."""
    in_memory = hasattr(os, "memfd_create")
    file = os.fdopen(os.memfd_create("stdin"), "w+b") if in_memory else tempfile.TemporaryFile()  # noqa: SIM115
    file.write(text.encode("utf-8", "surrogatepass"))
    file.seek(0)  # which also writes what is buffered
    return file


def _one_line(text: str) -> str:
    """Returns `text` without line breaks and control characters, cut to a length that fits a table."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    return printable if len(printable) <= _MAX_DETAIL else printable[: _MAX_DETAIL - 3] + "..."
