"""Write the plan of each 7B training config into its head comment: memory, time and checkpoint on the cards it is for.

    python docs/make_plans.py             a minute or two, no GPU
    python docs/make_plans.py --check     exit status 1 if a comment is not what this would write

The line is that of `recipes/plan_memory.py`, on the cards that the config's command line names.
"""

import argparse
import re
import sys
from pathlib import Path

import wmtp  # noqa: F401  # isort: skip  # first: it silences what torchtune says when it is imported

from wmtp.config import load
from wmtp.training.planning.cards import find_card
from wmtp.training.planning.plan import plan_training
from wmtp.training.planning.simulation import fake_world

ROOT = Path(__file__).resolve().parent.parent
CARD, CARDS = "a100_80gb", 4
LINE = re.compile(r"^# Plan: .*(?:\n# {7}.*)*\n", re.MULTILINE)


def configs() -> list[Path]:
    """Returns the training configs of 7B models."""
    found = sorted((ROOT / "configs").glob("*_7b/*.yaml"))
    return [file for file in found if "optimizer" in load(file)]


def planned(file: Path, mesh) -> str:
    """Returns a config's text with its plan."""
    text = file.read_text()
    plan = plan_training(load(file), mesh, find_card(CARD))
    line = (
        f"# Plan: {plan.memory / 1e9:.1f} GB on each of {CARDS} x {plan.card.name} (in the {plan.moment}), "
        f"{plan.step_seconds:.1f} s a step,\n#       {plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.0%}; "
        f"a checkpoint is {plan.checkpoint / 1e9:.1f} GB (recipes/plan_memory.py).\n"
    )
    if LINE.search(text):
        return LINE.sub(line, text)
    head, rest = text.split("\n\n", 1)
    return f"{head}\n#\n{line}\n{rest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    mesh, stale = fake_world(CARDS), []
    for file in configs():
        text = planned(file, mesh)
        if text != file.read_text():
            stale.append(str(file.relative_to(ROOT)))
            if not check:
                file.write_text(text)
        print(file.relative_to(ROOT), LINE.search(text).group().replace("\n#      ", "").strip(), flush=True)
    if check and stale:
        sys.exit(f"stale: {', '.join(stale)}; run python docs/make_plans.py")


if __name__ == "__main__":
    main()
