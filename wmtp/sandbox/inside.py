"""The judge's side of tests that run in the program's process (`AssertionJob.inside`), as other harnesses run them.

The report comes from the program's own process, so that a program that sets out to fool these tests can. One that only
ends early (`sys.exit(0)`, `os._exit(0)`, a thread) cannot: nothing but a report of every step, with the nonce, counts.
"""

import secrets

from wmtp.sandbox.jobs import AssertionJob, Verdict
from wmtp.sandbox.session import Session
from wmtp.sandbox.supervise import Ended


def judge_inside(job: AssertionJob, session: Session, verdicts: list[Verdict]) -> tuple[Verdict, str]:
    """Have the tests run one after the other until one fails; appends to `verdicts`."""
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
            return verdict, f"{step}: {detail}"
    return "passed", ""


def _read_report(report: dict, nonce: str) -> tuple[Verdict, str]:
    """What the process says of a step; raises `Ended` where that is no report."""
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
