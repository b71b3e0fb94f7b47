"""What is judged and what comes out: the limits, the two kinds of job, the outcome. Plain data, no behaviour."""

from dataclasses import asdict, dataclass, field, fields
from typing import Literal

Verdict = Literal[
    "passed", "wrong_answer", "exception", "timeout", "memory", "output_limit", "violation", "harness_error"
]


@dataclass(frozen=True)
class Limits:
    """What one program (assertion job) or one test (stdio job, or assertion job with `apart`) may use.

    Fields:
        cpu_seconds: CPU time of all its threads; the kernel kills at the next whole second, the verdict is exact.
        wall_seconds: time by the clock from when it is handed its program; a loaded machine must not cause timeouts.
        memory_bytes: resident memory of its own (anonymous or swapped pages, not those of files) beyond what the warm
            interpreter has; where `Sandbox.missing` names `resident memory`, address space. `import torch` holds 0.3 GB
            and takes 3 GB of address space.
        output_bytes: stdout and stderr together; also the size of one answer, and a quarter of all answers.
        threads: threads beside the main one.
        open_files: highest file descriptor + 1.
        file_bytes: size of one file it writes; the whole scratch folder is bounded by `SCRATCH_BYTES` where a tmpfs
            can be mounted.
    """

    cpu_seconds: float = 10.0
    wall_seconds: float = 30.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 16 << 20
    threads: int = 64
    open_files: int = 128
    file_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not value > 0:
                raise ValueError(f"{each.name} must be > 0, got {value} (Limits)")


@dataclass(frozen=True)
class AssertionJob:
    """A program judged by trusted Python (the shape of MBPP, HumanEval and LeetCode).

    Fields:
        program: model-written code, run as a module that is not `__main__`.
        tests: trusted Python, run by the judge one after the other until one fails; all must pass. Their free names
            stand for the program's objects. Builtins are the judge's, whatever the program defines, and so is an
            attribute of a free name of the standard library (`sys.getsizeof`).
        setup: dataset code that runs in the program's namespace after the program.
        preamble: trusted code run by the judge in the tests' namespace before the tests.
        entry_point: expression evaluated once in the program's namespace, bound to `candidate` and, where it is a
            plain name or ends in one (`Solution().twoSum`), to that name. A builtin's name (`sum`) is the program's
            in the tests only where it is the whole entry point and no test says `candidate`.
        limits: overrides the sandbox's.
        inside: the tests run in the confined process, in one namespace with the program (preamble, program, set-up,
            tests), as other harnesses do. Every limit holds and ending early never passes, but a program that sets out
            to fool these tests can. For tests that the protected judge cannot express, and to be flagged as such.
        apart: each test gets a process of its own, with the limits of its own, as in benchmarks that limit a call.

    The program gets copies of the arguments: a test that looks for a change made in place fails.
    """

    program: str
    tests: tuple[str, ...]
    setup: str = ""
    preamble: str = ""
    entry_point: str | None = None
    limits: Limits | None = None
    # Not in the repr, by which tasks are hashed: runs are of the same tasks however these are judged.
    inside: bool = field(default=False, repr=False)
    apart: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if not self.tests or isinstance(self.tests, str):
            raise ValueError(f"tests must be a tuple of at least one test, got {self.tests!r:.80} (AssertionJob)")


@dataclass(frozen=True)
class StdioTest:
    """One run of a program: what it reads from stdin, what it must write to stdout."""

    input: str
    output: str


@dataclass(frozen=True)
class StdioJob:
    """A program that reads stdin and writes stdout (the shape of CodeContests), run as `__main__` once per test.

    With `decimals`, tokens of stdout are also right that are the expected decimal number, see `compare.decimal_match`.
    """

    program: str
    tests: tuple[StdioTest, ...]
    limits: Limits | None = None
    stop_at_first_failure: bool = True
    decimals: bool = field(default=False, repr=False)  # not in the repr, by which tasks are hashed: all of a set agree

    def __post_init__(self) -> None:
        if not self.tests:
            raise ValueError("tests must hold at least one test, got none (StdioJob)")


Job = AssertionJob | StdioJob


@dataclass(frozen=True)
class Outcome:
    """What the judge found.

    Fields:
        verdict: `passed`, or the first failure's. `harness_error` is never the program's fault.
        detail: one line for people: which test, what exception. Empty where all passed.
        tests: verdict of each test judged; shorter than the job's where judging stopped.
        lenient_tests: stdio only: each judged test under DeepMind's lenient rule (`compare.lenient_match`).
        cpu_seconds: of the program, over all its tests.
        wall_seconds: of the judging.
        judged: "inside" where the tests ran in the program's process (`AssertionJob.inside`), which can fool them.
    """

    verdict: Verdict
    detail: str
    tests: tuple[Verdict, ...]
    lenient_tests: tuple[bool, ...]
    cpu_seconds: float
    wall_seconds: float
    judged: Literal["protected", "inside"] = "protected"


def job_to_wire(job: Job, limits: Limits) -> dict:
    """Returns `job` as JSON-ready data, with those limits."""
    kind = "assertion" if isinstance(job, AssertionJob) else "stdio"
    return {"kind": kind, **asdict(job), "limits": asdict(limits)}


def job_from_wire(data: dict) -> Job:
    """Returns the job that `job_to_wire` was given; the job's limits are always set."""
    values = {name: value for name, value in data.items() if name != "kind"}
    values["limits"] = Limits(**values["limits"])
    if data["kind"] == "assertion":
        return AssertionJob(**values | {"tests": tuple(values["tests"])})
    return StdioJob(**values | {"tests": tuple(StdioTest(**test) for test in values["tests"])})


def outcome_from_wire(data: dict) -> Outcome:
    """Returns the outcome sent by a worker as `dataclasses.asdict`."""
    return Outcome(**data | {"tests": tuple(data["tests"]), "lenient_tests": tuple(data["lenient_tests"])})
