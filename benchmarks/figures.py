"""How the benchmarks print a figure: one JSON line of name, value, unit, and what it is held against.

`python benchmarks/figures.py LINES.jsonl` prints such lines as a Markdown table.
"""

import json
import sys
from pathlib import Path


def report(name: str, value: float, unit: str, against: str) -> None:
    print(json.dumps({"name": name, "value": round(value, 3), "unit": unit, "against": against}), flush=True)


def table(lines: list[str]) -> str:
    """Returns a Markdown table, a row a figure."""
    figures = [json.loads(line) for line in lines if line.startswith("{")]
    rows = [f"| {f['name']} | {f['value']} {f['unit']} | {f['against']} |" for f in figures]
    return "\n".join(["| figure | value | against, or of |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table(Path(sys.argv[1]).read_text().splitlines()))
