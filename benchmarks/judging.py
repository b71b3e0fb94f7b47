"""The judge: how long it takes, and whether a right program ever fails.

    python benchmarks/judging.py [--programs 500] [--rounds 2]
    python benchmarks/judging.py --golds [--repeats 5] [--load]

Times are of MBPP's own solutions (the test split), first all of them on two workers, then one at a time on one worker.
Beside them the plainest judge there is: a fresh `python -I` for each program, that runs the program, the set-up and the
asserts in one namespace, its exit status being the verdict. That judge is fooled by `sys.exit(0)`; it is here as the
price of an interpreter's start. The contenders take turns, round after round, so that a machine that slows down slows
both.

With --golds, the solutions of MBPP, HumanEval and CodeContests are judged with all their tests, several times, with
--load beside one spinning process per core; a flake is a right program that did not pass.

One JSON line per figure: name, value, unit, against. The data are read as in `tests/sandbox/golds.py`.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "sandbox")]

import golds  # noqa: E402  (beside the tests, found by the line above)
from figures import report  # noqa: E402

from wmtp.sandbox import AssertionJob, Limits, Sandbox  # noqa: E402

warnings.simplefilter("ignore")  # some of the data sets' programs have invalid escapes

POOL_BAR_SECONDS = 12
PROGRAM_BAR_MILLISECONDS = 8
SLEEPERS, SLEEP_SECONDS, SLEEPERS_BAR = 4, 5, 1.3
SLEEPER = f"import time\n\n\ndef f(x):\n    time.sleep({SLEEP_SECONDS})\n    return x\n"


def fresh_interpreter(job: AssertionJob) -> str:
    """The baseline: "passed" where a new interpreter runs program, set-up and asserts and leaves with status 0."""
    source = "\n".join([job.program, job.setup, *job.tests])
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", source],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    return "passed" if done.returncode == 0 else f"status {done.returncode}"


def in_the_pool(jobs: list[AssertionJob]) -> float:
    """Seconds for all `jobs` on two workers, once the pool is up."""
    with Sandbox(workers=2) as sandbox:
        started = time.perf_counter()
        outcomes = sandbox.judge(jobs)
        seconds = time.perf_counter() - started
    require([outcome.verdict for outcome in outcomes])
    return seconds


def one_at_a_time(jobs: list[AssertionJob], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every program in every round, by contender.

    A contender has all programs to itself before the other's turn: starting interpreters empties the caches.
    """
    milliseconds = {"sandbox": [], "fresh interpreter": []}
    with Sandbox(workers=1) as sandbox:
        judges = (lambda job: sandbox.judge([job])[0].verdict, fresh_interpreter)
        for _ in range(rounds):
            for name, judge in zip(milliseconds, judges, strict=True):
                for job in jobs:
                    started = time.perf_counter()
                    require([judge(job)])
                    milliseconds[name].append(1000 * (time.perf_counter() - started))
    return milliseconds


def beside_sleepers(golds_: list[AssertionJob], wall_seconds: float) -> tuple[float, int]:
    """Time of right programs with sleepers among them, in units of what it must take, and how often a job was repeated.

    It must take the sleep shared over two workers, and the golds alone, which are judged in the same pool before.
    """
    job = AssertionJob(SLEEPER, ("assert f(1) == 1",), limits=Limits(wall_seconds=wall_seconds))
    mixed, step = list(golds_), len(golds_) // SLEEPERS
    for index in reversed(range(SLEEPERS)):
        mixed.insert(index * step, job)
    with Sandbox(workers=2) as sandbox:
        started = time.perf_counter()
        require([outcome.verdict for outcome in sandbox.judge(golds_)])
        alone = time.perf_counter() - started
        started = time.perf_counter()
        outcomes = sandbox.judge(mixed)
        seconds = time.perf_counter() - started
        slept = [outcome.verdict for outcome, each in zip(outcomes, mixed, strict=True) if each is job]
        require(slept, "timeout" if wall_seconds < SLEEP_SECONDS else "passed")
        asleep = SLEEPERS * min(SLEEP_SECONDS, wall_seconds) / 2
        return seconds / (asleep + alone), sandbox.times_alone


def require(verdicts: list[str], expected: str = "passed") -> None:
    if others := Counter(verdict for verdict in verdicts if verdict != expected):
        raise SystemExit(f"error: {len(verdicts)} programs must be judged {expected}, and there were {dict(others)}")


def times(args) -> None:
    jobs = [job for _, job in golds.mbpp("test")][: args.programs]
    seconds = statistics.median(in_the_pool(jobs) for _ in range(args.rounds))
    report(f"{len(jobs)} MBPP solutions on 2 workers", seconds, "s", f"bar <= {POOL_BAR_SECONDS} for 500")
    for wall_seconds in (SLEEP_SECONDS - 1, 30):
        ratio, repeated = beside_sleepers(jobs[:200], wall_seconds)
        name = f"{SLEEPERS} sleepers of {SLEEP_SECONDS} s among {len(jobs[:200])} solutions, limit {wall_seconds} s"
        against = f"sleep / 2 workers + solutions alone; bar <= {SLEEPERS_BAR}; {repeated} judged again alone"
        report(name, ratio, "x", against)
    milliseconds = one_at_a_time(jobs, args.rounds)
    sandbox, fresh = (statistics.median(values) for values in milliseconds.values())
    report("one program, one worker, median", sandbox, "ms", f"bar <= {PROGRAM_BAR_MILLISECONDS}")
    report(
        "one program, one worker, 95th percentile", statistics.quantiles(milliseconds["sandbox"], n=20)[-1], "ms", ""
    )
    report("one program, fresh `python -I`, exit status, median", fresh, "ms", "the baseline, which sys.exit(0) fools")
    report("sandbox, time of one program", sandbox / fresh, "x", "fresh `python -I`")


def spin() -> None:
    while True:
        pass


def repeated_golds(args) -> None:
    """All solutions, again and again; every one that does not pass is named on stderr."""
    spinners = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(os.cpu_count())]
    spinners = spinners if args.load else []
    for process in spinners:
        process.start()
    try:
        tasks, flakes, started = golds.all_golds(), 0, time.perf_counter()
        with Sandbox(workers=2) as sandbox:
            for repeat in range(args.repeats):
                outcomes = sandbox.judge(job for _, job in tasks)
                for (name, _), outcome in zip(tasks, outcomes, strict=True):
                    if outcome.verdict != "passed":
                        flakes += 1
                        print(f"repeat {repeat}: {name}: {outcome.verdict}: {outcome.detail}", file=sys.stderr)
        seconds = time.perf_counter() - started
    finally:
        for process in spinners:
            process.kill()
            process.join()
    machine = f"{args.repeats} times, beside {len(spinners)} spinning processes"
    report("right programs judged", len(tasks) * args.repeats, "programs", machine)
    report("right programs that did not pass", flakes, "programs", f"{machine}; bar 0")
    report("time of all repeats", seconds, "s", machine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--golds", action="store_true", help="judge all solutions, instead of measuring times")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--load", action="store_true", help="with --golds: keep every core busy meanwhile")
    args = parser.parse_args()
    if not golds.DATA.is_dir():
        lacking = f"no data in {golds.DATA}; set WMTP_DATA to the folder that holds mbpp/, humaneval/, code_contests/"
        if args.golds:
            parser.error(lacking)
        print(f"the judge is not measured: {lacking}", file=sys.stderr)
        return
    repeated_golds(args) if args.golds else times(args)


if __name__ == "__main__":
    main()
