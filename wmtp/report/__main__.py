"""Summaries of runs from their metrics.jsonl: python -m wmtp.report runs/tiny/rho1"""

import sys
from pathlib import Path

from wmtp.errors import clear_errors
from wmtp.report.run_summary import run_summary

with clear_errors():
    for argument in sys.argv[1:]:
        print(run_summary(Path(argument)))
