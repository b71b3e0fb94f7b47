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
from dataclasses import asdict, replace
from typing import IO

from wmtp.sandbox import compare, confine, filesystem, wire
from wmtp.sandbox.assertions import judge_assertions
from wmtp.sandbox.jobs import AssertionJob, Job, Limits, Outcome, StdioJob, StdioTest, Verdict, job_from_wire
from wmtp.sandbox.session import Session
from wmtp.sandbox.supervise import ANSWERED, Failure, Flag, Hangup, Process, ZygoteHandle, ZygoteLost

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
    abandoned = False
    try:
        _serve(connection, judge)
    except (Hangup, BrokenPipeError, ConnectionResetError):
        abandoned = True  # the caller's process is gone
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
        flag: one byte, as `Process` takes it.
    """

    def __init__(self, settings: dict, hangup: int, flag: Flag) -> None:
        self._settings = settings
        self._hangup, self._flag = hangup, flag
        self._zygote: ZygoteHandle | None = None

    def report(self) -> dict:
        """Returns the zygote's report of its protections, once it is there."""
        return self._ready_zygote().report

    def _ready_zygote(self) -> ZygoteHandle:
        if self._zygote is None:
            self._zygote = ZygoteHandle(self._settings)
        return self._zygote

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
        self._tests: list[Verdict] = []
        self._lenient: list[bool] = []
        self._cpu_seconds, self._starved = 0.0, False
        try:
            report = self.report()
            if self._settings["floor"] and not report["floor"]:  # a replaced zygote may have got less
                raise ZygoteLost(f"the zygote lacks protections: {'; '.join(report['missing'])}")
            failure = self._assertions(job) if isinstance(job, AssertionJob) else self._stdio(job)
        except ZygoteLost as error:
            self.close()
            failure = Failure("violation" if self._flag[0] & ANSWERED else "harness_error", str(error))
            self._tests[len(job.tests) - 1 :] = [failure.verdict]
        verdict, detail = (failure.verdict, _one_line(failure.detail)) if failure else ("passed", "")
        seconds = self._cpu_seconds, time.monotonic() - start
        outcome = Outcome(verdict, detail, tuple(self._tests), tuple(self._lenient), *seconds)
        return outcome, verdict == "timeout" and self._starved

    def _start(self, job: Job, stdin: int | None) -> Process:
        return Process(self._ready_zygote(), job.limits or Limits(), stdin, self._hangup, self._flag)

    def _close(self, process: Process) -> None:
        process.close()
        self._cpu_seconds += process.report.get("cpu", 0.0)

    def _assertions(self, job: AssertionJob) -> Failure | None:
        for first in range(len(job.tests)) if job.apart else (0,):
            part = replace(job, tests=job.tests[first : first + 1]) if job.apart else job
            failure = self._assertions_of_process(part, first)
            if failure is not None:
                self._tests[first + len(part.tests) - 1 :] = [failure.verdict]
                return failure
        return None

    def _assertions_of_process(self, job: AssertionJob, first: int) -> Failure | None:
        process = self._start(job, None)
        self._flag[0] = 0
        session = Session(process)
        try:
            _await_ready(process)
            failure = judge_assertions(job, session, first)
        finally:
            self._tests += ["passed"] * session.passed
            spoke = session.failure is None and process.unasked()
            self._close(process)
        if failure is None and spoke:
            failure = Failure("violation", "the program sent an answer that was not asked for")
        failure = failure or process.exceeded()
        self._starved = failure is not None and failure.by_clock and process.starved()
        return failure

    def _stdio(self, job: StdioJob) -> Failure | None:
        first = None
        for index, test in enumerate(job.tests):
            failure = self._stdio_test(job, test)
            self._tests.append(failure.verdict if failure else "passed")
            if failure is not None and first is None:
                first = failure.during(f"test {index}")
                if job.stop_at_first_failure:
                    break
        return first

    def _stdio_test(self, job: StdioJob, test: StdioTest) -> Failure | None:
        with _input_file(test.input) as stdin:
            process = self._start(job, stdin.fileno())
        self._flag[0] = 0
        try:
            _await_ready(process)
            process.send({"program": job.program})
            failure = _stdio_failure(process)
        except Failure as ended:
            failure = ended
        finally:
            self._close(process)
        failure = process.exceeded() or failure
        self._lenient.append(False)
        if failure is not None:
            self._starved = self._starved or (failure.by_clock and process.starved())
            return failure
        output, expected = bytes(process.stdout), test.output.encode("utf-8", "surrogatepass")
        try:
            self._lenient[-1] = compare.lenient_match(output, expected)
            same = compare.decimal_match if job.decimals else compare.exact_match
            if same(output, expected):
                return None
            return Failure("wrong_answer", compare.difference(output, expected))
        except MemoryError:
            return Failure("memory", "the judge ran out of memory on the program's output")


def _await_ready(process: Process) -> None:
    """Takes the first message, which is from before the program is read: it can be trusted, and a failure is ours."""
    try:
        message = process.receive()
    except Failure as ended:
        raise ZygoteLost(f"the process did not start: {ended.detail}") from None
    if "ready" not in message:
        raise ZygoteLost(str(message.get("fatal", "the process did not start")))
    process.usage_at_start = message["ready"]


def _stdio_failure(process: Process) -> Failure | None:
    """Waits for the program's end: what went wrong, if anything did. The verdict rests on stdout, not on this."""
    process.wait()
    message = process.take_frame()
    if message is not None and type(message.get("raised")) is dict:
        text, refused = (message["raised"].get(name) for name in ("text", "refused_memory"))
        text = text if type(text) is str else "the program sent what is no message"
        return Failure.raised(text, refused is True, process.limits)
    return process.ended() if process.report.get("status") != 0 else None


def _input_file(text: str) -> IO[bytes]:
    """Returns a regular file to read from: programs ask for its size, read its descriptor, or open it again."""
    in_memory = hasattr(os, "memfd_create")  # some builds of Python lack it
    file = os.fdopen(os.memfd_create("stdin"), "w+b") if in_memory else tempfile.TemporaryFile()  # noqa: SIM115
    file.write(text.encode("utf-8", "surrogatepass"))
    file.seek(0)  # which also writes what is buffered
    return file


def _one_line(text: str) -> str:
    """Returns `text` without line breaks and control characters, cut to a length that fits a table."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    return printable if len(printable) <= _MAX_DETAIL else printable[: _MAX_DETAIL - 3] + "..."
