"""From data in S3 to a model in production and back, on two real services of this machine. Also `make ops-demo`.

    python benchmarks/ops_demo.py [--keep FOLDER]

Starts an S3 server (moto) and an `mlflow server` that keeps its artifacts there. Trains two tiny models with
output_dir=s3://..., evaluates both, registers and promotes them, has a promotion refused, rolls back; then finds
everything again from an empty folder, through MLflow alone. Prints every command it runs, and stops the services at
the end, whatever the end is. Exit status 1 if any step did not do what it should.

The models learn the very eight one-line programs that they are judged on, one for 250 steps, the other for 10: this
shows tools, not models. --keep leaves database, logs and caches in a folder, which must be new.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

BUCKET, MODEL = "wmtp", "wmtp-tiny"
TASKS = f"s3://{BUCKET}/data/tasks.jsonl"
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
# What the demo needs and no one wants to read: progress bars, and what libraries say as they are imported.
NOISE = re.compile(
    r"\d(it|step|sample|s)/(s|it|step|sample)|%\||torchao|Warning|warnings\.warn|^\s*$|mlflow\.store\.db"
)


def tasks() -> list[dict]:
    """Eight one-line programs with a test each, as rows of MBPP."""
    return [
        {
            "task_id": number, "text": f"Add {word}.", "code": f"def add_{word}(x):\n    return x + {number}\n",
            "test_list": [f"assert add_{word}(1) == {number + 1}"], "test_setup_code": "", "challenge_test_list": [],
        }
        for word, number in NUMBERS.items()
    ]  # fmt: skip


class StepFailed(RuntimeError):
    """A step that did not do what it should."""


class Shell:
    """Runs the project's commands in one environment, and shows them with what they say."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, {**os.environ, **environment}
        self._processes: list[subprocess.Popen] = []

    def run(self, *commands: list[str], status: int = 0, says: str = "", cwd: Path = ROOT, **environment: str) -> str:
        """Run commands at once; each must end with this status, and say this. Returns what they said."""
        started = []
        for command in commands:
            print(f"\n$ {_shown(command)}", flush=True)
            log = (self.folder / f"log{len(self._processes):02d}.txt").open("w+")
            own = {"env": {**self.environment, **environment}, "stdout": log, "stderr": subprocess.STDOUT, "cwd": cwd}
            process = subprocess.Popen([sys.executable, *command[1:]], **own)
            self._processes.append(process)
            started.append((process, log))
        begin, everything = time.monotonic(), ""
        for process, log in started:
            process.wait(timeout=600)
            log.seek(0)
            said = [line for line in re.split(r"[\r\n]+", log.read()) if not NOISE.search(line)]
            log.close()
            print(*(f"    {line}" for line in said), sep="\n", flush=True)
            everything += "\n".join(said) + "\n"
            if process.returncode != status or says not in everything:
                expected = f"status {status}" + (f" and {says!r}" if says else "")
                raise StepFailed(f"it ended with status {process.returncode}; expected was {expected}")
        print(f"    ({time.monotonic() - begin:.0f} s)", flush=True)
        return everything

    def stop(self) -> None:
        """End what still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            process.wait()


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


@contextlib.contextmanager
def services(folder: Path) -> Iterator[dict[str, str]]:
    """An S3 server with an empty bucket, and an MLflow server over it; gives the environment of their users."""
    import boto3
    from services import AWS_ENVIRONMENT, mlflow_server, moto_server

    with moto_server() as s3:
        environment = {**AWS_ENVIRONMENT, "AWS_ENDPOINT_URL": s3, "MLFLOW_S3_ENDPOINT_URL": s3}
        os.environ.update(environment)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        rows = "".join(json.dumps(row) + "\n" for row in tasks())
        boto3.client("s3").put_object(Bucket=BUCKET, Key=TASKS.partition(f"{BUCKET}/")[2], Body=rows.encode())
        artifacts = f"s3://{BUCKET}/mlflow"
        with mlflow_server(folder / "mlflow", artifacts=artifacts, environment=environment) as server:
            print(f"S3 at {s3} (bucket {BUCKET}), MLflow at {server.url} (SQLite, artifacts in {artifacts})")
            environment |= {"MLFLOW_TRACKING_URI": server.url, "OMP_NUM_THREADS": "1"}
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            yield environment


def train(name: str, steps: int) -> list[str]:
    return [
        "python", "recipes/full_finetune_distributed_wmtp.py", "--config", "configs/tiny/uniform.yaml",
        f"output_dir=s3://{BUCKET}/runs/{name}", f"tracking.run_name={name}", f"max_steps={steps}", "save_every=200",
        "dataset._component_=wmtp.data.mbpp", f"dataset.source={TASKS}", "dataset.split=all", "~dataset.root",
        "~dataset.max_functions", "~dataset.max_body_lines", "eval_dataset=null", "seq_len=128", "packed=false",
        "batch_size=8", "optimizer.lr=5e-3", "log_every=10",
    ]  # fmt: skip


def evaluate(name: str, training_run: str) -> list[str]:
    return [
        "python", "recipes/eval_mbpp.py", "--config", "configs/tiny/eval_mbpp.yaml",
        f"output_dir=s3://{BUCKET}/runs/eval_{name}", f"tracking.run_name=eval_{name}",
        f"checkpoint=runs:/{training_run}/export", "name=add", "tasks._component_=wmtp.eval.mbpp_tasks",
        f"tasks.source={TASKS}", "tasks.split=all", "~tasks.challenge_tests", "model.max_seq_len=256",
        "num_samples=1", "temperatures=[0.0]", "fixed_temperature=0.0", "pass_at=[1]", "judges=1",
    ]  # fmt: skip


def promote(action: str, **keys: str) -> list[str]:
    command = ["python", "recipes/promote.py", "--config", "configs/tiny/promote.yaml", f"action={action}"]
    return command + [f"{key}={value}" for key, value in keys.items()]


def run_id(client, name: str) -> str:
    """The id of the only run of that name, looked up in MLflow."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    [run] = client.search_runs(experiments, f"attributes.run_name = '{name}'")
    return run.info.run_id


def demonstrate(shell: Shell, folder: Path) -> None:
    from wmtp.registry.versions import aliased, open_store

    client = open_store(shell.environment["MLFLOW_TRACKING_URI"])

    def production(expected: str | None) -> None:
        there = aliased(client, MODEL, "production")
        if there != expected:
            raise StepFailed(f"production points at version {there}, expected was {expected}")

    title("1. Two trainings, at once; data from S3, checkpoints and exports to S3, metrics to MLflow")
    shell.run(train("short", 10), train("long", 250), says="exported")
    title("2. Each export evaluated, found by its run")
    names = ("short", "long")
    shell.run(*(evaluate(name, run_id(client, name)) for name in names), says="pass@1 =")
    evaluations = {name: run_id(client, f"eval_{name}") for name in names}

    title("3. The first model: registered with its card, alias staging; then production, as the first")
    limits = {"card.limits": '["trained on the very tasks that it is judged on"]'}
    shell.run(
        promote("register", evaluation_run=evaluations["short"], **limits),
        says=f"{MODEL}@staging: nothing -> version 1",
    )
    shell.run(promote("production", evaluation_run=evaluations["short"]), says="first in production")
    production("1")
    title("4. The second model, judged on the same tasks, takes its place")
    shell.run(
        promote("register", evaluation_run=evaluations["long"], **limits),
        says=f"{MODEL}@staging: version 1 -> version 2",
    )
    shell.run(promote("production", evaluation_run=evaluations["long"]), says="not worse beyond the interval")
    production("2")
    title("5. The first one is worse than chance explains: refused, with status 1 and nothing changed")
    shell.run(promote("production", evaluation_run=evaluations["short"]), status=1, says="worse beyond the interval")
    production("2")
    title("6. Back to what was before the last move, and that undone too")
    shell.run(promote("rollback"), says="version 2 -> version 1")
    production("1")
    shell.run(promote("rollback"), says="version 1 -> version 2")
    production("2")
    title("7. The registry: versions, and every move that was made")
    shell.run(promote("show"), says="undoes move 5")
    title("8. From an empty folder with an empty cache, through MLflow alone")
    empty = folder / "empty"
    empty.mkdir()
    again = ["python", str(Path(__file__).resolve()), "--find-again", f"models:/{MODEL}@production"]
    shell.run(again, cwd=empty, says="found", WMTP_CACHE=str(empty / "cache"))


def find_again(name: str) -> None:
    """What a stranger's machine gets from a registered model's name: the model, its config, report and card."""
    from transformers import AutoModelForCausalLM

    from wmtp.pretrained import checkpoint_sha256, resolve_checkpoint
    from wmtp.registry.versions import aliased, open_store, read_version

    client = open_store()
    model, _, alias = name.removeprefix("models:/").partition("@")
    version = read_version(client, model, aliased(client, model, alias))
    folder = resolve_checkpoint(name)
    sha256 = checkpoint_sha256(folder)
    if sha256 != version.tags["wmtp.model_sha256"]:
        raise StepFailed(f"the model's SHA-256 is {sha256}, the registry says {version.tags['wmtp.model_sha256']}")
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    print(f"{name} is version {version.number}: {loaded.num_parameters():,} parameters, SHA-256 as registered")
    artifacts = {"training config": f"runs:/{version.run_id}/config.yaml", "card": version.tags["wmtp.model_card"]}
    for evaluation, run in version.evaluations.items():
        artifacts |= {
            f"report of {evaluation}": f"runs:/{run}/report.md",
            f"results of {evaluation}": f"runs:/{run}/results.json",
        }
    for what, where in artifacts.items():
        run, _, path = where.removeprefix("runs:/").partition("/")
        text = Path(client.download_artifacts(run, path, ".")).read_text()
        print(f"found the {what}: {where} ({len(text):,} characters)")
        if what == "card":
            print(text.split("---\n", 2)[1] + "...")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a new folder for database, logs and caches")
    parser.add_argument("--find-again", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.find_again:
        find_again(arguments.find_again)
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the services stop in `with`
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        if arguments.keep:
            arguments.keep.mkdir(parents=True)
            folder = arguments.keep.resolve()
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wmtp-ops-demo-")))
        environment = stack.enter_context(services(folder)) | {"WMTP_CACHE": str(folder / "cache")}
        shell = Shell(folder, environment)
        stack.callback(shell.stop)
        try:
            demonstrate(shell, folder)
        except StepFailed as error:
            print(f"\nFAILED: {error}", file=sys.stderr, flush=True)
            return 1
    print(f"\nAll steps did what they should, in {time.monotonic() - begin:.0f} s; both services are stopped.")
    return 0


def _shown(command: list[str]) -> str:
    """A command over several lines that a shell takes as they are."""
    lines, width = [""], 110
    for word in map(shlex.quote, command):
        if len(lines[-1]) + len(word) > width:
            lines.append("     ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
