"""`python -m wmtp.tracking replay OUTPUT_DIR [--tracking-uri URI]` sends the records that a run left unsent."""

import argparse
from pathlib import Path

from wmtp.errors import clear_errors
from wmtp.tracking.replay import replay

parser = argparse.ArgumentParser(prog="python -m wmtp.tracking", description="Records that have not reached MLflow.")
commands = parser.add_subparsers(required=True, metavar="COMMAND")
command = commands.add_parser("replay", help="send the records that a run left unsent; twice changes nothing")
command.add_argument("output_dir", type=Path, help="the run's output_dir")
command.add_argument("--tracking-uri", help="the store; by default the run's own")
arguments = parser.parse_args()
with clear_errors():
    print(replay(arguments.output_dir, arguments.tracking_uri))
