"""Where things are, and what a run left behind."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def read_metrics(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
