"""The data sets' own solutions as jobs that must pass, made by the loaders that the evaluation recipes use."""

from shared_data import DATA

from wmtp.eval import assertion_tasks, code_contests, humaneval_tasks, mbpp_tasks
from wmtp.sandbox import Limits

# One solution needs 3 s of CPU time for a test, and CPU time too doubles where another process shares the core.
CONTEST_LIMITS = Limits(cpu_seconds=20.0, wall_seconds=120.0)


def gold_jobs(tasks) -> list:
    """(name, job) of each task's own solution."""
    return [(task.task_id, task.job(task.program(task.solution))) for task in tasks]


def mbpp(split: str) -> list:
    """MBPP's solutions of a split, judged by the challenge tests too."""
    return gold_jobs(mbpp_tasks(str(DATA / "mbpp"), split, challenge_tests=True))


def humaneval() -> list:
    return gold_jobs(humaneval_tasks(str(DATA / "humaneval" / "HumanEval.jsonl.gz")))


def mbppplus() -> list:
    """Tasks of MBPP+, as many as lie there."""
    return list(mbpp_tasks(str(DATA / "mbppplus" / "sample30.jsonl.gz"), "all"))


def leetcode(count: int) -> list:
    """`count` LeetCode solutions, spread over the data set."""
    tasks = assertion_tasks(str(DATA / "leetcode" / "LeetCodeDataset-v0.2.0-train.jsonl.gz"))
    return gold_jobs(tasks[:: max(1, len(tasks) // count)][:count])


def contests(tests_each: int | None = None) -> list:
    """CodeContests' solutions that print exactly the expected output.

    tests_each: only so many of a problem's ten tests; all ten together take a minute of computing.
    """
    jobs = []
    for task in code_contests(str(DATA / "code_contests" / "problems.jsonl"), reproducible_only=True):
        job = task.job(task.solutions[0], limits=CONTEST_LIMITS)
        jobs.append((task.name, type(job)(job.program, job.tests[:tests_each], limits=job.limits)))
    return jobs


def all_golds(tests_each: int | None = None) -> list:
    """Every gold program but LeetCode's: 374 + 90 + 500 MBPP, 164 HumanEval, 153 CodeContests."""
    splits = [task for split in ("train", "validation", "test") for task in mbpp(split)]
    return [*splits, *humaneval(), *contests(tests_each)]
