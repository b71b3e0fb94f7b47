"""A recipe of a second, for tests of a sweep: a loss that falls to what its keys say, from its own checkpoint on.

It keeps a ledger of its own starts and ends, and holds its folder as the real recipes do.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml

from wmtp.errors import Stopped, clear_errors
from wmtp.storage.lock import FolderLock


def change(cfg, key, value):
    *parents, last = key.split(".")
    for parent in parents:
        cfg = cfg[parent]
    cfg[last] = value


@clear_errors()
def main():
    config, *changes = sys.argv[2:]
    cfg = yaml.safe_load(Path(config).read_text())
    for key, _, text in (text.partition("=") for text in changes):
        change(cfg, key, yaml.safe_load(text))
    folder = Path(cfg["output_dir"])
    lock = FolderLock.of(folder)
    lock.take()
    folder.mkdir(parents=True, exist_ok=True)
    metrics, ledger, signals = folder / "metrics.jsonl", folder / "ledger", []
    signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    with ledger.open("a") as file:
        file.write(f"start {len(lines)} {os.getpid()} threads={os.environ['OMP_NUM_THREADS']}\n")
    if cfg["fails"]:
        raise ValueError("error: it cannot be")
    for step in range(len(lines), cfg["steps"]):
        time.sleep(cfg["seconds"])
        value = (cfg["lr"] - 0.3) ** 2 + cfg["seed"] / 100 + 1 / (step + 1)
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step + 1, "time": time.time(), cfg["logs"]: value}) + "\n")
        if signals and step + 1 < cfg["steps"]:  # after the last step there is nothing to go on with
            raise Stopped(f"stopped after step {step + 1}")
    with ledger.open("a") as file:
        file.write(f"end {cfg['steps']}\n")
    lock.release()


if __name__ == "__main__":
    main()
