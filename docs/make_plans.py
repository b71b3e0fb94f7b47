"""Write the plan of each 7B config into its head comment: memory and time on as many cards as its command line names.

    python docs/make_plans.py             two minutes or three, no GPU
    python docs/make_plans.py --check     exit status 1 if a comment is not what this would write

The figures are those of `recipes/plan_memory.py`.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path

import wmtp  # noqa: F401  # isort: skip  # first: it silences what torchtune says when it is imported
import torch.distributed as dist

from wmtp.config import load
from wmtp.training.planning.cards import find_card
from wmtp.training.planning.plan import plan_config
from wmtp.training.planning.simulation import fake_world

ROOT = Path(__file__).resolve().parent.parent
CARD = find_card("a100_80gb")
CARDS = re.compile(r"--nproc_per_node (\d+)")
LINE = re.compile(r"^# Plan: .*(?:\n# {7}.*)*\n", re.MULTILINE)


def configs() -> list[Path]:
    """Returns the configs that run a 7B model, those of few cards first."""
    found = [file for file in (ROOT / "configs").glob("*_7b/*.yaml") if "model" in load(file)]
    return sorted(found, key=lambda file: (cards(file), file))


def cards(file: Path) -> int:
    return int(CARDS.search(file.read_text())[1])


def planned(file: Path) -> str:
    """Returns a config's text with its plan."""
    text = file.read_text()
    mesh = fake_world(cards(file))
    plan = plan_config(load(file), mesh, CARD)
    dist.destroy_process_group()
    mfu = f", MFU {plan.mfu:.0%}" if plan.flops else ""
    saved = f"; a checkpoint is {plan.checkpoint / 1e9:.1f} GB" if plan.checkpoint else ""
    said = (
        f"Plan: {plan.memory / 1e9:.1f} GB on each of {plan.cards} x {plan.card.name} (in the {plan.moment}), "
        f"{plan.step_seconds:.1f} s a {plan.unit}, {plan.tokens_per_second:,.0f} tokens/s{mfu}{saved} "
        "(recipes/plan_memory.py)."
    )
    line = textwrap.fill(said, 110, initial_indent="# ", subsequent_indent="#       ") + "\n"
    if LINE.search(text):
        return LINE.sub(line, text)
    head, rest = text.split("\n\n", 1)
    return f"{head}\n#\n{line}\n{rest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for file in configs():
        text = planned(file)
        if text != file.read_text():
            stale.append(str(file.relative_to(ROOT)))
            if not check:
                file.write_text(text)
        print(file.relative_to(ROOT), LINE.search(text).group().replace("\n#      ", "").strip(), flush=True)
    if check and stale:
        sys.exit(f"stale: {', '.join(stale)}; run python docs/make_plans.py")


if __name__ == "__main__":
    main()
