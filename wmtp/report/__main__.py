"""What runs say, alone and beside each other.

python -m wmtp.report runs/tiny/rho1                      a run's held-out CE before and after, and its speed
python -m wmtp.report runs/a runs/b 0123...cdef           folders or MLflow ids; seeds are grouped by their config
    [baseline=RUN-or-cell] [set=code] [head=1]            what is compared with what
    [evaluation=mbpp] [figure=pass_at_1]                  compare by the tasks of an evaluation instead
    [margin=0.01]                                         also test equivalence: differences up to it do not matter
    [other_data=[CELL,...]]                               cells that were trained on other data on purpose
    [allow_mixed=true]                                    show runs apart that cannot be compared
    [details=true]                                        all statistics of each comparison, as JSON lines
"""

import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

from wmtp.config import ConfigError, ConfigReader
from wmtp.errors import clear_errors
from wmtp.report.comparison import compare_runs, evaluation_arms, held_out_arms, require_one_config, table_text
from wmtp.report.run_summary import run_summary
from wmtp.report.runs import load_run, require_comparable


def main(arguments: list[str]) -> None:
    """Prints a summary of one run, or a table of several and what they show."""
    names = [a for a in arguments if "=" not in a or Path(a).exists()]
    read = ConfigReader(OmegaConf.from_dotlist([a for a in arguments if a not in names]))
    baseline, set_name = read.get("baseline", None), str(read.get("set", ""))
    head, margin = read.integer("head", 1, minimum=1) or 1, read.number("margin", None, above=0)
    evaluation, figure = read.text("evaluation", None), read.text("figure", None)
    other_data = read.plain("other_data", [])
    allow_mixed, details = read.flag("allow_mixed", False), read.flag("details", False)
    read.done()
    if figure is not None and evaluation is None:
        raise ConfigError(f"figure={figure} is of an evaluation: say of which, evaluation=NAME")
    if not names:
        raise ConfigError("no run is given: python -m wmtp.report RUN RUN ..., of output folders or MLflow run ids")
    runs = list(map(load_run, names))
    if len(runs) == 1:
        print(run_summary(runs[0]))
        return
    require_one_config(runs)
    groups = require_comparable(runs, allow_mixed, other_data=other_data)
    having = [group for group in groups if any(baseline in (run.name, run.cell) for run in group)]
    for group in groups:
        of_tasks = [] if evaluation is None else [evaluation_arms(group, evaluation, figure)]
        print(table_text(group, of_tasks))
        if having and group not in having:
            print(f"no claim: these cannot be compared with {baseline}")
            continue
        [metric] = of_tasks or [held_out_arms(group, set_name, head)]
        [found] = compare_runs(group, [metric], baseline=baseline, margin=margin)
        for comparison in found:
            print(json.dumps(comparison.statistics()) if details else comparison)
        if not found:
            print(metric.why_no_claim())


if __name__ == "__main__":
    with clear_errors():
        main(sys.argv[1:])
