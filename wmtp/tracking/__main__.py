"""`python -m wmtp.tracking replay OUTPUT_DIR [--tracking-uri URI]` sends the records that a run left unsent."""

import argparse
from pathlib import Path

from wmtp.errors import clear_errors
from wmtp.tracking.replay import replay

parser = argparse.ArgumentParser(prog="python -m wmtp.tracking", description="Records that have not reached MLflow.")
parser.add_argument("command", choices=["replay"], help="send what a run left unsent; twice changes nothing")
parser.add_argument("output_dir", type=Path, help="the run's output_dir")
parser.add_argument("--tracking-uri", help="the store; by default the run's own")
arguments = parser.parse_args()
with clear_errors():
    print(replay(arguments.output_dir, arguments.tracking_uri))
