"""Kill runs at random moments, let them go on, and hold what comes out against runs that nobody killed.

    python benchmarks/torture.py [--kills 30] [--seed 0] [--keep FOLDER]

Full fine-tuning, LoRA, the critic and scoring, on configs/tiny, with one process and with two. A victim is one rank,
all ranks, the launcher, or all ranks in the middle of a save or of an upload to S3 (a moto server here); the signal is
SIGKILL. Each run is then started again with resume=auto, to be killed again or to end. After a kill no process of it
may live on; at the end every metric of every step, the weights and the files of scores must be those of the
uninterrupted run, bit for bit, and no checkpoint may be torn, here or in S3.

Where the launcher is the victim it is `tune run`; other runs are forked from a process that has imported torch, which
saves half a minute a start. About half an hour on 2 cores. One JSON line for each kill, and one for all: tried,
survived (it went on and ended well), equal. Exit status 1 unless the three agree.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import boto3
import psutil
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from processes import run_recipe_file, start  # noqa: E402
from services import AWS_ENVIRONMENT, moto_server  # noqa: E402

from wmtp.config import load  # noqa: E402
from wmtp.files import MANIFEST, file_sha256, verify_manifest  # noqa: E402
from wmtp.training.checkpoint import complete_checkpoints  # noqa: E402

BUCKET = "torture"
SECONDS = 600.0  # to wait for anything
# (how many processes, where output_dir is, how they are started) -> who is killed, and when.
VICTIMS = {
    (1, "local", "forked"): ("all ranks", "in a save"),
    (1, "local", "tune run"): ("launcher",),
    (2, "local", "forked"): ("one rank", "all ranks", "in a save"),
    (2, "local", "tune run"): ("launcher",),
    (2, "s3", "forked"): ("in an upload",),
}
SPEED = ("per_second", "time", "data_wait", "peak_memory_gib", "tflops", "mfu")  # the only figures that may differ


@dataclass(frozen=True)
class Job:
    """A recipe on a tiny config, with enough steps to be killed between them."""

    recipe: str
    config: str
    changes: dict

    @property
    def trains(self) -> bool:
        return self.recipe != "score_reference"


_TRAINING = {"max_steps": 30, "save_every": 2, "eval_every": 10, "tracking": None}
JOBS = {
    "full": Job("full_finetune_distributed_wmtp", "rho1", {**_TRAINING, "token_view": None}),
    "lora": Job("lora_wmtp", "lora_rho1", {**_TRAINING, "token_view": None}),
    "critic": Job("critic_stage1", "critic_stage1", {**_TRAINING, "patience": None}),
    "scoring": Job("score_reference", "score_reference", {"tracking": None, "documents_per_part": 2, "batch_size": 1}),
}


class Failed(RuntimeError):
    """A run that did not do what it should, with the end of what it printed."""


class Run:
    """One run of a job in its folder: started, killed, and started again."""

    def __init__(self, job: Job, processes: int, folder: Path, reference: Path, remote: str | None = None) -> None:
        self.job, self.processes, self.folder, self.remote = job, processes, folder, remote
        folder.mkdir(parents=True)
        self.cache = folder / "cache"  # of this machine: an empty one stands for another machine
        cfg = load(ROOT / "configs" / "tiny" / f"{job.config}.yaml")
        cfg.output_dir, cfg.resume = remote or str(folder / "output"), "auto"
        for key, value in job.changes.items():
            cfg[key] = value
        for key in ("reference_checkpoint", "checkpoint"):
            if cfg.get(key) is not None:
                cfg[key] = str(reference)
        self.config, self.log = folder / "config.yaml", folder / "log.txt"
        OmegaConf.save(cfg, self.config)

    @property
    def output(self) -> Path:
        """The folder that the run works in, on this machine."""
        return self.cache / "outputs" / self.remote.removeprefix("s3://") if self.remote else self.folder / "output"

    def progress(self) -> int:
        """Grows with what the run has done."""
        if not self.job.trains:
            return len(list(self.output.glob("data/part-*.parquet")))
        file = self.output / "metrics.jsonl"
        return file.stat().st_size if file.exists() else 0

    def saving(self) -> bool:
        """Whether something is being written just now."""
        pattern = "checkpoints/step_*.tmp" if self.job.trains else "data/*.tmp"
        return next(self.output.glob(pattern), None) is not None

    def uploading(self) -> bool:
        """Whether a checkpoint (of scoring, a part) is in S3, and the manifest that completes it is not."""
        names = [name for name, _ in self.uploaded()]
        if not self.job.trains:
            return any(name.endswith(".parquet") for name in names) and MANIFEST not in names
        steps = {name.rpartition("/")[0] for name in names if name.startswith("checkpoints/step_")}
        return any(f"{step}/{MANIFEST}" not in names for step in steps)

    def uploaded(self) -> Iterator[tuple[str, int]]:
        """Name and size of each object of the run in S3."""
        prefix = self.remote.removeprefix(f"s3://{BUCKET}/") + "/"
        pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        for item in (item for page in pages for item in page.get("Contents", ())):
            yield item["Key"].removeprefix(prefix), item["Size"]

    def result(self) -> dict[str, object]:
        """All that may not depend on kills: each step's metrics, and the hashes of weights and scores."""
        files = [path for path in self.output.rglob("*") if path.suffix in (".safetensors", ".parquet")]
        found: dict[str, object] = {str(f.relative_to(self.output)): file_sha256(f) for f in sorted(files)}
        if self.job.trains:
            lines = map(json.loads, (self.output / "metrics.jsonl").read_text().splitlines())
            found["metrics"] = [{k: v for k, v in line.items() if not k.endswith(SPEED)} for line in lines]
        return found

    def left_over(self) -> list[str]:
        """What was left half-written: after a kill it may be there, after a run's end not."""
        return [str(path) for path in self.output.rglob("*.tmp")]

    def torn(self) -> list[str]:
        """What looks complete and is not, which may be there at no time."""
        bad = []
        for folder in complete_checkpoints(self.output / "checkpoints"):
            try:
                verify_manifest(folder)
            except ValueError as error:
                bad.append(str(error))
        if self.remote:
            sizes = dict(self.uploaded())
            for name in [name for name in sizes if name.startswith("checkpoints/") and name.endswith(MANIFEST)]:
                below = name.removesuffix(MANIFEST)
                key = f"{self.remote.removeprefix(f's3://{BUCKET}/')}/{name}"
                entries = json.loads(boto3.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read())
                bad += [f"{name}: {f}" for f, entry in entries.items() if sizes.get(below + f) != entry["bytes"]]
        return bad


class Started:
    """The processes of a run that goes on, started by `tune run`."""

    def __init__(self, run: Run) -> None:
        self.run, self._least = run, run.progress()
        command = [str(Path(sys.executable).with_name("tune")), "run", "--nproc_per_node", str(run.processes)]
        command += [f"recipes/{run.job.recipe}.py", "--config", str(run.config)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WMTP_CACHE": str(run.cache)}
        with run.log.open("a") as log:
            self._launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def launcher(self) -> list[psutil.Process]:
        """The process that started the ranks, while it lives."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [psutil.Process(self._launcher.pid)]
        return []

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by rank; as many as are there."""
        found = {}
        for launcher in self.launcher():
            for child in launcher.children():
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    rank = child.environ().get("RANK")
                    if rank is not None:
                        found[int(rank)] = child
        return [found[rank] for rank in sorted(found)]

    def running(self) -> bool:
        return self._launcher.poll() is None

    def wait(self) -> int:
        """The exit status."""
        try:
            return self._launcher.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self._launcher.kill()
            raise Failed(f"no end after {SECONDS:.0f} s: {self.run.log.read_text()[-2000:]}") from None

    # What follows holds however the processes were started.

    def wait_until(self, what: Callable[[], bool], seconds: float = SECONDS) -> bool:
        """Whether it came true before the run ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if what():
                return True
            if not self.running():
                return False
            time.sleep(0.002)
        return False

    def going_on(self) -> bool:
        """Whether it has done something since it was started, and took back what came after the last checkpoint."""
        self._least = min(self._least, progress := self.run.progress())
        return progress > self._least

    def kill(self, victim: str, chance: random.Random) -> None:
        """End one rank, the launcher, or all ranks, without a word of warning, and wait until nobody is left."""
        launcher, ranks = self.launcher(), self.ranks()
        chosen = {"one rank": chance.sample(ranks, min(1, len(ranks))), "launcher": launcher}
        for process in chosen.get(victim, ranks):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait()
        _, alive = psutil.wait_procs([*launcher, *ranks], timeout=60)
        for process in alive:
            process.kill()
        if alive:
            raise Failed(f"{victim} killed, and {len(alive)} of {len(ranks)} ranks lived on")

    def end(self) -> None:
        """Wait for a good end."""
        status = self.wait()
        if status:
            raise Failed(f"exit status {status}: {self.run.log.read_text()[-3000:]}")


class Forked(Started):
    """The processes of a run without their start-up, and without a launcher: when one dies, this ends the others."""

    def __init__(self, run: Run) -> None:
        self.run, self._least = run, run.progress()
        file = (run.job.recipe, str(run.config))
        with mock.patch.dict(os.environ, WMTP_CACHE=str(run.cache)):
            self._processes = start(run_recipe_file, *file, size=run.processes, log=run.log)  # and where they meet
        self._members = self._processes.members

    def launcher(self) -> list[psutil.Process]:
        return []

    def ranks(self) -> list[psutil.Process]:
        return [psutil.Process(member.pid) for member in self._members if member.is_alive()]

    def running(self) -> bool:
        return all(member.is_alive() for member in self._members)

    def wait(self) -> int:
        end = time.monotonic() + SECONDS
        while any(member.is_alive() for member in self._members):
            late = time.monotonic() > end
            if late or any(member.exitcode for member in self._members):
                for member in self._members:
                    member.kill()
                    member.join()
            if late:
                raise Failed(f"no end after {SECONDS:.0f} s: {self.run.log.read_text()[-2000:]}")
            time.sleep(0.02)
        return next((member.exitcode for member in self._members if member.exitcode), 0)


STARTS = {"forked": Forked, "tune run": Started}


@dataclass(frozen=True)
class Kill:
    """Who is killed, and when: at a share of what an uninterrupted run does (for a save or upload: the next one then),
    or, where `share` is None, while the run starts, after so many seconds or with its first progress."""

    victim: str
    share: float | None
    seconds: float = 0.0


def strike(started: Started, kill: Kill, progress: float, chance: random.Random) -> bool:
    """Wait for the moment and kill; False where the run ended first.

    Args:
        progress: the run's at the moment of the kill.
    """
    if kill.share is None:
        started.wait_until(lambda: len(started.ranks()) == started.run.processes)
        started.wait_until(started.going_on, kill.seconds)
        reached = started.running()
    else:
        reached = started.wait_until(lambda: started.run.progress() >= progress)
        if kill.victim in ("in a save", "in an upload"):
            moment = started.run.saving if kill.victim == "in a save" else started.run.uploading
            reached = reached and started.wait_until(moment)
            time.sleep(chance.random() * 0.02)
    if reached:
        started.kill(kill.victim, chance)
    return reached


class Torture:
    """Kills by plan, one run after the other, each held against the uninterrupted run of its job and process count."""

    def __init__(self, folder: Path, reference: Path, chance: random.Random) -> None:
        self.folder, self.reference, self.chance = folder, reference, chance
        self.tried = self.survived = self.equal = 0
        self._calm: dict[tuple[str, int], tuple[dict, int]] = {}  # result, and progress at the end
        self._runs = 0

    def run(self, name: str, processes: int, where: str, how: str, kills: list[Kill]) -> None:
        """Run a job to its end, with these kills on the way, each within its part of the run."""
        expected, whole = self._uninterrupted(name, processes)
        kills, misses = list(kills), 0
        while kills and misses < 3:
            run, struck, parts, torn = self._new(name, processes, where), 0, len(kills), []
            try:
                while kills and strike(
                    STARTS[how](run), kills[0], (struck + (kills[0].share or 0)) / parts * whole, self.chance
                ):
                    kill = kills.pop(0)
                    self.tried, struck, torn = self.tried + 1, struck + 1, torn + run.torn()
                    print(json.dumps({"job": name, "processes": processes, "killed": kill.victim}), flush=True)
                    if run.remote and self.chance.random() < 0.5:
                        shutil.rmtree(run.cache)  # it goes on elsewhere, from what S3 holds
                STARTS[how](run).end()  # where the run has ended already, nothing is left to do
            except Failed as failure:
                print(f"{name}, {processes} processes: {failure}", file=sys.stderr, flush=True)
                misses += not struck
                continue
            misses += not struck
            self.survived += struck
            wrong = [*torn, *run.torn(), *run.left_over(), *different(run.result(), expected)]
            for line in wrong:
                print(f"{name}, {processes} processes: {line}", file=sys.stderr, flush=True)
            self.equal += 0 if wrong else struck
            shutil.rmtree(run.folder)

    def _new(self, name: str, processes: int, where: str) -> Run:
        self._runs += 1
        uri = f"s3://{BUCKET}/{self._runs}" if where == "s3" else None
        return Run(JOBS[name], processes, self.folder / f"{self._runs:02d}_{name}", self.reference, uri)

    def _uninterrupted(self, name: str, processes: int) -> tuple[dict, int]:
        if (name, processes) not in self._calm:
            run = self._new(name, processes, "local")
            Forked(run).end()
            self._calm[name, processes] = (run.result(), run.progress())
            shutil.rmtree(run.folder)
        return self._calm[name, processes]


def different(found: dict, expected: dict) -> list[str]:
    """What is not as in the uninterrupted run, a line each."""
    return [f"{name} is not the uninterrupted run's" for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)]  # fmt: skip


def plan(kills: int, chance: random.Random) -> dict[tuple[str, int, str, str], list[Kill]]:
    """Who is killed in which run: all kinds in turn, as many as asked for, in random order within a run."""
    every = [(name, *how, victim) for how, victims in VICTIMS.items() for victim in victims for name in JOBS]
    chance.shuffle(every)
    planned: dict[tuple[str, int, str, str], list[Kill]] = {}
    for number in range(kills):
        *run, victim = every[number % len(every)]
        starting = victim not in ("in a save", "in an upload") and chance.random() < 0.2
        share = None if starting else chance.uniform(0.1, 0.7)
        planned.setdefault(tuple(run), []).append(Kill(victim, share, chance.random() * 15))
    return planned


def train_reference(folder: Path) -> Path:
    """A trained model of the tiny configs' shape, which Rho-1 and scoring read."""
    run = Run(Job("full_finetune_distributed_wmtp", "reference", {"tracking": None}), 1, folder, folder)
    Forked(run).end()
    return run.output / "export"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="leave failed runs and their logs in this folder")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        torture = _torture(folder, arguments.kills, arguments.seed)
    except BaseException:  # nothing goes on behind the back of who broke it off
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        raise
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    counts = {"tried": torture.tried, "survived": torture.survived, "equal": torture.equal}
    print(json.dumps({"name": "torture", **counts}), flush=True)
    sys.exit(len({arguments.kills, *counts.values()}) > 1)


def _torture(folder: Path, kills: int, seed: int) -> Torture:
    with moto_server() as url:
        os.environ |= {**AWS_ENVIRONMENT, "AWS_ENDPOINT_URL": url}
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        chance = random.Random(seed)
        torture = Torture(folder, train_reference(folder / "reference"), chance)
        for run, planned in sorted(plan(kills, chance).items()):
            torture.run(*run, planned)
    return torture


if __name__ == "__main__":
    main()
