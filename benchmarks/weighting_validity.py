"""Are the weights right? Noise, learning under noise, fault localisation, and all weightings side by side.

    python benchmarks/weighting_validity.py [noise|learning|faults|side_by_side|all] [--full] [--fresh] [--out FOLDER]
    python benchmarks/weighting_validity.py --write-docs      # tables and figures of docs/validity.md from the results

The reduced form takes some 36 minutes of a core, 21 on 2, the full form three hours of one;
docs/validity.md explains them and shows what the full form gave. A finished stage, a trained model and a finished
fine-tuning are kept under --out and not computed again unless --fresh. Everything is seeded. One JSON line per figure:
name, value, unit, against.
"""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("noise", "learning", "faults", "side_by_side")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", default="all", choices=(*STAGES, "all"))
    parser.add_argument("--full", action="store_true", help="the form that docs/validity.md shows")
    parser.add_argument("--fresh", action="store_true", help="compute finished stages again; trained models are kept")
    parser.add_argument("--finished", action="store_true", help="side_by_side from the runs that are kept, no new ones")
    parser.add_argument("--seeds", type=int, default=3, help="of the learning stage")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "validity")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="only write the tables and figures of docs/validity.md and docs/methods.md, from the full form",
    )
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds must be >= 2 for an interval, got {args.seeds}")
    form = args.out / ("full" if args.full else "reduced")
    if args.write_docs:
        from validity.docs import write_docs

        write_docs(args.out, ROOT / "docs")
        return

    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    import torch

    torch.set_num_threads(args.threads)
    print(f"# {shlex.join(['python', *sys.argv])}", flush=True)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        run_stage(stage, form, args)


def run_stage(stage: str, form: Path, args) -> None:
    """Compute a stage unless its result is there for the same settings, then print its figures."""
    from validity import faults, learning, noise, side_by_side
    from validity.docs import print_figures

    module = {"noise": noise, "learning": learning, "faults": faults, "side_by_side": side_by_side}[stage]
    settings = module.FULL if args.full else module.REDUCED
    if stage == "learning":
        settings = dataclasses.replace(settings, seeds=tuple(range(args.seeds)))
    if stage == "faults" and not Path(settings.source()).is_dir():
        print(
            f"# faults is left out: no {settings.source()}; set WMTP_DATA to the folder that holds condefects/",
            file=sys.stderr,
        )
        return
    path = form / f"{stage}.json"
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
    if not args.fresh and path.exists() and json.loads(path.read_text())["settings"] == wanted:
        result = json.loads(path.read_text())
    else:
        started, cpu_started = time.perf_counter(), time.process_time()
        of_kept = {"finished": True} if args.finished and stage == "side_by_side" else {}
        result = module.run(settings, args.out / "kept", fresh=args.fresh, **of_kept)
        result["seconds"] = round(time.perf_counter() - started, 1)
        result.setdefault("cpu_seconds", round(time.process_time() - cpu_started, 1))  # a machine may be shared
        result["command"] = shlex.join(["python", *sys.argv])
        result["versions"] = {"python": platform.python_version(), "torch": version("torch"), "threads": args.threads}
        form.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1))
        partial.rename(path)
    print_figures(stage, result)


if __name__ == "__main__":
    main()
