"""In the judge: runs the trusted tests of an `AssertionJob`, and says whose fault it is where they fail.

Tests with `inside=True` run in the program's process, as other harnesses run them, and are only reported here: a
program that sets out to fool them can. One that only ends early (`sys.exit(0)`, `os._exit(0)`, a thread) cannot:
nothing but an answer to every step counts.
"""

import random
import signal
import types
import warnings

from wmtp.sandbox.jobs import AssertionJob, Limits
from wmtp.sandbox.names import TestBroken, compiled, make_namespace, name_exceptions
from wmtp.sandbox.session import Session
from wmtp.sandbox.supervise import ANSWERED, Failure, Hangup, ZygoteLost, described

_OWN_GRACE_SECONDS = 1.0  # what the tests may take beyond the program's wall limit
_OWN_CPU_SECONDS = 1.0  # at least; else the tests themselves may take as much CPU time as the program


class TestStuck(BaseException):
    """A trusted test went on after the time limit."""

    def __init__(self, by_clock: bool) -> None:
        self.by_clock = by_clock


def judge_assertions(job: AssertionJob, session: Session, first: int = 0) -> Failure | None:
    """Runs the tests from the number ``first`` on, in bounded time, until one fails; counts those that pass.

    While the judge waits for the program nothing is raised: the program's own limits hold there, so that its lateness
    is its own whichever clock strikes first.
    """

    def strike(number: int, frame: types.FrameType | None) -> None:
        if not session.waiting:
            raise TestStuck(by_clock=number == signal.SIGALRM)

    signal.signal(signal.SIGALRM, strike)
    signal.signal(signal.SIGPROF, strike)
    try:
        try:
            _limit_tests(session.process.limits)
            return _run_inside(job, session, first) if job.inside else _run_tests(job, session, first)
        finally:
            _limit_tests(None)
    except TestStuck as stuck:  # between two tests, or while the limit was being lifted
        _limit_tests(None)
        return _explain(stuck, session)


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


def _run_tests(job: AssertionJob, session: Session, first: int) -> Failure | None:
    random.seed(0)
    with warnings.catch_warnings():  # a test's filters are not the next job's
        warnings.showwarning = lambda *args, **kwargs: None
        step = "loading"
        try:
            codes = [compiled(test, f"test {index}") for index, test in enumerate(job.tests, first)]
            namespace = make_namespace(job, session)
            session.request("load", job.program, job.setup, job.entry_point, False)
            session.process.flag[0] = 0  # nothing of it is left; from the next byte on all is the program's doing
            name_exceptions(job, session, namespace)
            for index, code in enumerate(codes, first):
                step = f"test {index}"
                exec(code, namespace)
                if session.failure is not None:  # the test caught it
                    return session.failure.during(step)
                session.passed += 1
        except BaseException as error:
            failure = _explain(error, session)
            return failure if isinstance(error, TestBroken) else failure.during(step)
    return None if session.requests else Failure("harness_error", "the tests never used the program")


def _explain(error: BaseException, session: Session) -> Failure:
    """Says whose fault an exception out of a test is: never ours once a byte has come from the program."""
    if isinstance(error, ZygoteLost | Hangup):
        raise error
    if session.failure is not None:
        return session.failure
    if error is session.raised:
        return session.raised_as
    if isinstance(error, TestBroken):
        return Failure("harness_error", str(error))
    detail = described(error)
    if isinstance(error, AssertionError):
        return Failure("wrong_answer", "; ".join([detail, *session.remarks]))
    if not session.answered:
        return Failure("harness_error", f"the test itself failed: {detail}")
    # The program has answered, and the test could not cope with the answer.
    if isinstance(error, TestStuck):
        return Failure("timeout", "the test did not come to an end with the program's answer", error.by_clock)
    if isinstance(error, MemoryError):
        return Failure("memory", "the test ran out of memory on the program's answer")
    return Failure("wrong_answer", f"the answer does not fit the test: {detail}")


def _run_inside(job: AssertionJob, session: Session, first: int) -> Failure | None:
    step = "preamble"
    try:
        for index, test in enumerate(job.tests, first):
            compiled(test, f"test {index}")
        session.request("execute", job.preamble)
        step = "loading"
        session.process.flag[0] = ANSWERED  # whatever ends this judge from here on is the program's doing
        session.request("load", job.program, job.setup, job.entry_point, True)
        for index, test in enumerate(job.tests, first):
            step = f"test {index}"
            session.request("execute", test)
            session.passed += 1
    except BaseException as error:
        failure = _explain(error, session)
        if failure.verdict == "exception" and step == "preamble":  # the program has not begun
            failure.verdict = "harness_error"
        elif isinstance(error, AssertionError) or type(error).__name__ == "Failed":  # of `pytest.raises`
            failure.verdict = "wrong_answer"
        return failure.during(step)
    return None
