"""The judge: a process that alone knows the expected values, and runs the trusted tests itself.

It has one zygote. Jobs come in and outcomes go out on a socket to the caller's process, one at a time.
"""

import contextlib
import functools
import json
import mmap
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import types
import warnings
from dataclasses import asdict

from wmtp.sandbox import compare, confine, wire
from wmtp.sandbox.inside import judge_inside
from wmtp.sandbox.jobs import AssertionJob, Job, Limits, Outcome, StdioTest, Verdict, job_from_wire
from wmtp.sandbox.names import TEST_MODULE, compiled, make_namespace, name_exceptions
from wmtp.sandbox.session import Session
from wmtp.sandbox.supervise import Ended, Hangup, Process, ZygoteHandle, ZygoteLost

MAX_DETAIL = 300
_OWN_MEMORY_BYTES = 1 << 30  # an answer must not make a test eat the machine
_OWN_GRACE_SECONDS = 1.0  # what the tests may take beyond the program's wall limit
_OWN_CPU_SECONDS = 1.0  # at least; else the tests themselves may take as much CPU time as the program
_MAX_DIGITS = 100_000  # of an integer that a test turns into a string: bounded, because that takes quadratic time


class TestStuck(BaseException):
    """A trusted test went on after the time limit."""


class TestBroken(Exception):
    """A trusted test fails for a reason of its own."""


def main() -> None:
    """Entry point of the process: settings as JSON in argv[1]."""
    settings = json.loads(sys.argv[1])
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, settings["connection"])
    sys.set_int_max_str_digits(_MAX_DIGITS)
    space = confine.address_space()
    if space:
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
        if abandoned:
            _remove_folders(settings)


def _remove_folders(settings: dict) -> None:
    """What the caller would have removed; the last judge to leave removes the folder of all."""
    shutil.rmtree(settings["root"], ignore_errors=True)
    with contextlib.suppress(OSError):
        os.remove(settings["outside"])
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(settings["outside"]))


def _serve(connection: socket.socket, judge: "Judge") -> None:
    """Judge what comes in until told to close; raises `Hangup` where the caller is gone."""
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


def _run_limited(job: AssertionJob, session: Session, verdicts: list[Verdict]) -> tuple[Verdict, str, bool]:
    """Run the tests in bounded time: verdict, detail, and whether the clock alone ended them.

    While the judge waits for the program nothing is raised: the program's own limits hold there, so that its lateness
    is its own whichever clock strikes first.
    """
    by_clock = False

    def strike(number: int, frame: types.FrameType | None) -> None:
        nonlocal by_clock
        if not session.waiting:
            by_clock = number == signal.SIGALRM
            raise TestStuck

    signal.signal(signal.SIGALRM, strike)
    signal.signal(signal.SIGPROF, strike)
    try:
        try:
            _limit_tests(job.limits)
            verdict, detail = _judge_tests(job, session, verdicts)
        finally:
            _limit_tests(None)
    except TestStuck as stuck:  # between two tests, or while the limit was being lifted
        _limit_tests(None)
        verdict, detail = _explain(stuck, session)
    return verdict, detail, by_clock if session.failure is None else session.failure.by_clock


def _limit_tests(limits: Limits | None) -> None:
    """Bound the time of the trusted tests, or lift the bound.

    The first two timers raise `TestStuck`. Inside one long C call (a power, a set of colliding hashes) no handler runs;
    there the third ends this process, and the pool finds in the shared flag whether an answer was to blame.
    """
    cpu = max(_OWN_CPU_SECONDS, limits.cpu_seconds) if limits else 0
    for timer, seconds in (
        (signal.ITIMER_REAL, limits.wall_seconds + _OWN_GRACE_SECONDS if limits else 0),
        (signal.ITIMER_PROF, cpu),
        (signal.ITIMER_VIRTUAL, cpu + _OWN_GRACE_SECONDS if limits else 0),
    ):
        signal.setitimer(timer, seconds, _OWN_GRACE_SECONDS if seconds else 0)


class Judge:
    """Judges jobs one at a time.

    Args:
        settings: `floor` (whether to insist on it), and `without`, `root`, `hidden`, `outside` and
            `bubblewrap` of `ZygoteHandle`.
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
            names = ("without", "root", "hidden", "outside", "bubblewrap")
            self._zygote = ZygoteHandle(**{name: self._settings[name] for name in names})
        return self._zygote

    def report(self) -> dict:
        """The zygote's report of its protections."""
        return self._ready_zygote().report

    def close(self) -> None:
        """End the zygote."""
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None

    def judge(self, job: Job) -> tuple[Outcome, bool]:
        """The outcome of `job`, and whether the machine is to blame for a timeout by the clock.

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
            verdict, detail = "violation" if self._flag[0] else "harness_error", str(error)
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
        """Judge an `AssertionJob`."""
        mode = "inside" if self.job.inside else "assertion"
        process = Process(zygote, mode, self.job.limits, None, self._hangup)
        session = Session(process, TEST_MODULE, self._flag)
        try:
            _await_ready(process)
            if self.job.inside:
                verdict, detail = judge_inside(self.job, session, self.tests)
                by_clock = session.failure is not None and session.failure.by_clock
            else:
                verdict, detail, by_clock = _run_limited(self.job, session, self.tests)
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
        """Judge a `StdioJob`."""
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
    """The first message comes from before the program is read: it can be trusted, and a failure is ours."""
    try:
        message = process.receive()
    except Ended as end:
        raise ZygoteLost(f"the process did not start: {end.detail}") from None
    if "ready" not in message:
        raise ZygoteLost(str(message.get("fatal", "the process did not start")))
    process.usage_at_start = message["ready"]


def _stdio_failure(process: Process) -> Ended | None:
    """Wait for the program's end: what went wrong, if anything did. The verdict rests on stdout, not on this."""
    process.wait()
    message = process.take_frame()
    if message is not None and type(message.get("done")) is dict:
        error = message["done"]
        bases = error.get("bases")
        verdict: Verdict = "memory" if type(bases) is list and "MemoryError" in bases else "exception"
        return Ended(verdict, f"{error.get('type')}: {error.get('message')}")
    status = process.report.get("status")
    return process.ended() if status != 0 else None


def _input_file(text: str):
    """A regular file to read from: programs ask for its size, read its descriptor, or open it again."""
    data = text.encode("utf-8", "surrogatepass")
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create("stdin"), "w+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (the caller closes it)
    with memoryview(data) as view:
        written = 0
        while written < len(data):
            written += file.write(view[written:])
    file.seek(0)
    return file


@functools.lru_cache(maxsize=512)
def _compiled(source: str, name: str) -> types.CodeType:
    try:
        return compiled(source, name)
    except (SyntaxError, ValueError) as error:
        raise TestBroken(f"{name} does not compile: {error}") from None


def _judge_tests(job: AssertionJob, session: Session, verdicts: list[Verdict]) -> tuple[Verdict, str]:
    """Run the tests one after the other until one fails; appends to `verdicts`."""
    random.seed(0)
    with warnings.catch_warnings():  # a test's filters are not the next job's
        warnings.showwarning = lambda *args, **kwargs: None
        try:
            codes = [_compiled(test, f"test {index}") for index, test in enumerate(job.tests)]
            namespace = _make_namespace(job, session)
            session.load(job.program, job.setup, job.entry_point)
            session.answered = False  # nothing of it is left; from the next byte on all is the program's doing
            name_exceptions(job, session, namespace)
        except TestBroken as error:
            verdicts.append("harness_error")
            return "harness_error", str(error)
        except BaseException as error:
            verdict, detail = _explain(error, session)
            verdicts.append(verdict)
            return verdict, f"loading: {detail}"
        for index, code in enumerate(codes):
            verdict, detail = _judge_test(code, namespace, session)
            verdicts.append(verdict)
            if verdict != "passed":
                return verdict, f"test {index}: {detail}"
    if not session.requests:
        verdicts[-1] = "harness_error"
        return "harness_error", "the tests never used the program"
    return "passed", ""


def _judge_test(code: types.CodeType, namespace: dict, session: Session) -> tuple[Verdict, str]:
    try:
        exec(code, namespace)
    except BaseException as error:
        return _explain(error, session)
    if session.failure is not None:  # the test caught it
        return session.failure.verdict, session.failure.detail
    return "passed", ""


def _explain(error: BaseException, session: Session) -> tuple[Verdict, str]:
    """Whose fault an exception is that came out of a test. Once a byte has come from the program, it is never ours."""
    if isinstance(error, ZygoteLost | Hangup):
        raise error
    if session.failure is not None:
        return session.failure.verdict, session.failure.detail
    if error is session.raised:
        return session.raised_verdict, session.raised_detail
    detail = _described(error)
    if isinstance(error, AssertionError):
        return "wrong_answer", detail
    if not session.answered:
        return "harness_error", f"the test itself failed: {detail}"
    # The program has answered, and the test could not cope with the answer.
    if isinstance(error, TestStuck):
        return "timeout", "the test did not come to an end with the program's answer"
    if isinstance(error, MemoryError):
        return "memory", "the test ran out of memory on the program's answer"
    return "wrong_answer", f"the answer does not fit the test: {detail}"


def _described(error: BaseException) -> str:
    """Type and message; the message may be an answer, and what comes of showing that is no verdict."""
    try:
        message = str(error)
    except (Hangup, ZygoteLost):
        raise
    except BaseException as again:
        message = f"<its message raised {type(again).__name__}>"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _make_namespace(job: AssertionJob, session: Session) -> dict:
    try:
        return make_namespace(job, session, _compiled(job.preamble, "preamble"))
    except (TestBroken, TestStuck):
        raise
    except BaseException as error:
        raise TestBroken(f"the preamble failed: {type(error).__name__}: {error}") from None


def _one_line(text: str) -> str:
    """`text` without line breaks and control characters, cut to a length that fits a table."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    return printable if len(printable) <= MAX_DETAIL else printable[: MAX_DETAIL - 3] + "..."
