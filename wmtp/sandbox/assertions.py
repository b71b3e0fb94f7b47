"""In the judge: runs the trusted tests of an `AssertionJob`, and says whose fault it is where they fail.

Tests with `inside=True` run in the program's process, as other harnesses run them, and are only reported here: a
program that sets out to fool them can. One that only ends early (`sys.exit(0)`, `os._exit(0)`, a thread) cannot:
nothing but a report of every step, with the nonce, counts.
"""

import functools
import random
import secrets
import signal
import types
import warnings

from wmtp.sandbox.jobs import AssertionJob, Limits, Verdict
from wmtp.sandbox.names import Namespace, compiled, make_namespace, name_exceptions
from wmtp.sandbox.session import Session
from wmtp.sandbox.supervise import Ended, Hangup, ZygoteLost

_OWN_GRACE_SECONDS = 1.0  # what the tests may take beyond the program's wall limit
_OWN_CPU_SECONDS = 1.0  # at least; else the tests themselves may take as much CPU time as the program


class TestStuck(BaseException):
    """A trusted test went on after the time limit."""


class TestBroken(Exception):
    """A trusted test fails for a reason of its own."""


def judge_outside(job: AssertionJob, session: Session, verdicts: list[Verdict]) -> tuple[Verdict, str, bool]:
    """Runs the tests in the judge and in bounded time; appends to `verdicts`.

    While the judge waits for the program nothing is raised: the program's own limits hold there, so that its lateness
    is its own whichever clock strikes first.

    Returns:
        Verdict, detail, and whether the clock alone ended them.
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
    """Bounds the time of the trusted tests, or lifts the bound.

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


def _judge_tests(job: AssertionJob, session: Session, verdicts: list[Verdict]) -> tuple[Verdict, str]:
    """Runs the tests one after the other until one fails; appends to `verdicts`."""
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


@functools.lru_cache(maxsize=512)
def _compiled(source: str, name: str) -> types.CodeType:
    try:
        return compiled(source, name)
    except (SyntaxError, ValueError) as error:
        raise TestBroken(f"{name} does not compile: {error}") from None


def _make_namespace(job: AssertionJob, session: Session) -> Namespace:
    try:
        return make_namespace(job, session, _compiled(job.preamble, "preamble"))
    except (TestBroken, TestStuck):
        raise
    except BaseException as error:
        raise TestBroken(f"the preamble failed: {type(error).__name__}: {error}") from None


def _explain(error: BaseException, session: Session) -> tuple[Verdict, str]:
    """Says whose fault an exception out of a test is: never ours once a byte has come from the program."""
    if isinstance(error, ZygoteLost | Hangup):
        raise error
    if session.failure is not None:
        return session.failure.verdict, session.failure.detail
    if error is session.raised:
        return session.raised_verdict, session.raised_detail
    detail = _described(error)
    if isinstance(error, AssertionError):
        return "wrong_answer", "; ".join([detail, *session.remarks])
    if not session.answered:
        return "harness_error", f"the test itself failed: {detail}"
    # The program has answered, and the test could not cope with the answer.
    if isinstance(error, TestStuck):
        return "timeout", "the test did not come to an end with the program's answer"
    if isinstance(error, MemoryError):
        return "memory", "the test ran out of memory on the program's answer"
    return "wrong_answer", f"the answer does not fit the test: {detail}"


def _described(error: BaseException) -> str:
    """Returns type and message; the message may be an answer, and what comes of showing that is no verdict."""
    try:
        message = str(error)
    except (Hangup, ZygoteLost):
        raise
    except BaseException as again:
        message = f"<its message raised {type(again).__name__}>"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def judge_inside(job: AssertionJob, session: Session, verdicts: list[Verdict]) -> tuple[Verdict, str, bool]:
    """Has the tests run in the program's process one after the other until one fails; see `judge_outside`."""
    nonce = secrets.token_hex(8)
    fields = ("program", "setup", "preamble", "tests", "entry_point")
    session.answered = True  # whatever ends this judge from here on is the program's doing
    session.process.send({"nonce": nonce, **{name: getattr(job, name) for name in fields}})
    for number, step in enumerate(["preamble", "loading", *(f"test {index}" for index in range(len(job.tests)))]):
        try:
            verdict, detail = _read_report(session.process.receive(), nonce)
        except Ended as end:
            session.failure = end
            verdict, detail = end.verdict, end.detail
        if verdict == "exception" and step == "preamble":  # the program has not begun
            verdict = "harness_error"
        if number > 1 or verdict != "passed":
            verdicts.append(verdict)
        if verdict != "passed":
            return verdict, f"{step}: {detail}", session.failure is not None and session.failure.by_clock
    return "passed", "", False


def _read_report(report: dict, nonce: str) -> tuple[Verdict, str]:
    """Returns what the process says of a step; raises `Ended` where that is no report."""
    if report.keys() != {"nonce", "error"} or report["nonce"] != nonce:
        raise Ended("violation", "the program sent an answer to what was not asked")
    error = report["error"]
    if error is None:
        return "passed", ""
    if type(error) is not dict or type(error.get("bases")) is not list:
        raise Ended("violation", "the program sent a malformed answer")
    detail = f"{error.get('type')}: {error.get('message')}".removesuffix(": ")
    if "MemoryError" in error["bases"]:
        return "memory", detail
    # pytest's `Failed` comes from `raises` where nothing was raised.
    failed = "AssertionError" in error["bases"] or error.get("type") == "Failed"
    return ("wrong_answer" if failed else "exception"), detail
