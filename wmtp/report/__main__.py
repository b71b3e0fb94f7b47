"""What a run's metrics.jsonl says, for people:  python -m wmtp.report runs/tiny/rho1"""

import sys
from pathlib import Path

from wmtp.report.run_summary import run_summary

for argument in sys.argv[1:]:
    try:
        print(run_summary(Path(argument)))
    except ValueError as error:
        sys.exit(f"error: {error}")
