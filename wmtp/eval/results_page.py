"""Writing an evaluation down: results.json for machines, report.md for people, timings apart.

results.json and report.md up to its last section are the same bytes for the same samples and judgements; what differs
from run to run (seconds, tokens per second) goes to timings.json and to the page's section Timings.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from wmtp.eval.markdown import cell, fenced, table
from wmtp.eval.protocols import Task
from wmtp.eval.results import ORACLE_NOTE, VERDICTS, temperature_name
from wmtp.eval.samples import Judgement, Key, Sample, sort_key
from wmtp.files import write_whole

_MEANING = {
    "passed": "all tests passed",
    "wrong_answer": "ran, but a test found the answer wrong",
    "exception": "does not compile, or raised",
    "timeout": "ran out of time",
    "memory": "ran out of memory",
    "output_limit": "wrote too much",
    "violation": "tried what the sandbox forbids, or disturbed the answers",
    "harness_error": "the judge's own failure; excluded",
}
_EXAMPLES = 2  # of each verdict
_TEXT_LIMIT = 1500  # characters of one text on the page
_PROMPT_LIMIT = 600  # characters of the end of a prompt


def write_results(folder: Path, results: dict, page: str, timings: Mapping[str, object]) -> None:
    """Writes results.json, timings.json and report.md, a :func:`results_page`; each appears only when whole."""
    write_whole(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_whole(folder / "report.md", page)
    write_whole(folder / "timings.json", json.dumps(dict(timings), indent=1) + "\n")


def write_tasks(
    path: Path,
    results: dict,
    samples: Sequence[Sample],
    judgements: Mapping[Key, Judgement],
    cpu_seconds: Mapping[Key, float | None],
) -> None:
    """Writes a JSON line for each task and temperature: its counts, and of each sample its number, verdict and time.

    `cpu_seconds` are of the judged program, and differ from run to run; of `gold_seconds` and `limit_seconds` there are
    none where `limits.cpu_seconds` holds for all.
    """
    by_task: dict[tuple[str, str], list[Sample]] = {}
    for sample in sorted(samples, key=sort_key):
        by_task.setdefault((temperature_name(sample.temperature), sample.task_id), []).append(sample)
    settings, rows = results["settings"], []
    for temperature, figures in results["temperatures"].items():
        for counts in figures["per_task"]:
            of_task = by_task[temperature, counts["task_id"]]
            row = {**counts, "temperature": temperature, "judged": judgements[of_task[0].key].judged}
            row["samples"] = [
                {"sample": s.sample, "verdict": judgements[s.key].verdict, "cpu_seconds": cpu_seconds.get(s.key)}
                for s in of_task
            ]
            if (gold := settings.get("gold_seconds", {}).get(counts["task_id"])) is not None:
                limit = max(settings["min_time_limit"], settings["gt_time_limit_factor"] * gold)
                row |= {"gold_seconds": gold, "limit_seconds": limit}
            rows.append(json.dumps(row) + "\n")
    write_whole(path, "".join(rows))


def headline(results: dict) -> list[str]:
    """Returns the main figures as lines for a terminal: each score, the oracle named as one, what was excluded."""
    fixed, many = results["fixed_temperature"], len(results["temperatures"]) > 1
    of_fixed = results["temperatures"][fixed]
    fewest, most = of_fixed["samples_per_task"]
    counts = f"{fewest} sample{'s' * (fewest != 1)}" if fewest == most else f"{fewest} to {most} samples"
    lines = [
        f"{_metric(name)} = {_percent(figure['estimate'])} % (95 % interval {_interval(figure)}), "
        f"{figure['tasks']} tasks, {counts} a task, temperature {fixed}"
        for name, figure in of_fixed["metrics"].items()
    ]
    if many:
        lines += [
            f"{_metric(name)} = {_percent(best['estimate'])} % at the oracle temperature {best['temperature']} "
            f"({ORACLE_NOTE})"
            for name, best in results["oracle"]["metrics"].items()
        ]
    return [*cautions(results), *lines]


def logged(results: dict, name: str) -> tuple[dict[str, float], dict[str, str]]:
    """Returns an evaluation's metrics and tags for MLflow; both say what keeps two evaluations from being compared."""
    table = results["temperatures"][results["fixed_temperature"]]
    figures = table["metrics"] | {f"protected_{k}": v for k, v in table.get("protected_metrics", {}).items()}
    inside = results["judged_inside"]["tasks"]
    metrics: dict[str, float] = {
        "tasks": results["tasks"],
        "of_tasks": results["of_tasks"],
        "samples": results["samples"],
        "tasks_judged_inside": inside,
        "excluded_harness_errors": results["excluded_harness_errors"],
    }
    for metric, figure in figures.items():
        metrics |= {metric: figure["estimate"], f"{metric}_low": figure["low"], f"{metric}_high": figure["high"]}
    partial = f"{results['tasks']} of {results['of_tasks']}" if results["tasks"] < results["of_tasks"] else "all"
    tags = {"wmtp.evaluated_tasks": partial, "wmtp.judged_inside": f"{inside} of {results['tasks']} tasks"}
    return {f"eval/{name}/{metric}": value for metric, value in metrics.items()}, tags


def results_page(
    results: dict,
    tasks: Sequence[Task],
    samples: Sequence[Sample],
    judgements: Mapping[Key, Judgement],
    *,
    title: str = "Evaluation",
    prompts: Mapping[str, str] | None = None,
    timings: Mapping[str, object] | None = None,
) -> str:
    """Returns a Markdown page: headline, intervals, failures with examples, settings, protections, timings.

    Args:
        results: of :func:`wmtp.eval.results.evaluation_results`, for these tasks, samples and judgements.
        prompts: task id to the text the model was shown, for the examples.
        timings: shown in the last section.
    """
    warnings = [f"> {cell(line)}" for line in cautions(results)]
    first = headline(results)[len(warnings)]
    parts = [f"# {cell(title)}", *warnings, f"**{first}**", "## Scores"]
    parts += [*scores(results), *_verdict_table(results)]
    parts += _examples(tasks, samples, judgements, prompts or {})
    parts += ["## Settings", fenced(json.dumps(results["settings"], indent=1, ensure_ascii=False))]
    parts += ["## Protections of the sandbox", *_protections(results["sandbox"])]
    if timings:
        listed = json.dumps(dict(timings), indent=1, ensure_ascii=False)
        parts += ["## Timings", "These differ from run to run.", fenced(listed)]
    return "\n\n".join(parts) + "\n"


def cautions(results: dict) -> list[str]:
    """Returns a line for each thing that the figures leave out and each protection that was missing."""
    excluded, lines = results["excluded_harness_errors"], []
    if excluded:
        lines.append(
            f"WARNING: {excluded} of {results['samples']} samples are excluded: the judge itself failed on them "
            "(harness_error). They count neither for nor against the model."
        )
    if inside := results["judged_inside"]["tasks"]:
        protected = results["temperatures"][results["fixed_temperature"]].get("protected_metrics", {})
        without = ", ".join(f"{_metric(name)} = {_percent(each['estimate'])} %" for name, each in protected.items())
        lines.append(
            f"CAUTION: {inside} of {results['tasks']} tasks are judged inside, with their tests in the program's "
            f"process: a program can fool these. {f'Without them {without}' if without else 'There are no others'}."
        )
    if unreadable := results.get("unreadable"):
        share = unreadable["samples"] / results["samples"]
        lines.append(
            f"WARNING: {unreadable['samples']} of {results['samples']} samples ({_percent(share)} %) are no Python "
            f"programs: {unreadable['likely_cause']}."
        )
    lines += _unfinished(results)
    if results["of_tasks"] > results["tasks"]:
        lines.append(
            f"Only {results['tasks']} of {results['of_tasks']} tasks are judged, those with samples "
            "(tasks.only=with_samples): these are not figures of the whole set."
        )
    for name, of_temperature in results["temperatures"].items():
        for metric, figure in of_temperature["metrics"].items():
            if figure["tasks"] < results["tasks"]:
                left_out = results["tasks"] - figure["tasks"]
                lines.append(
                    f"WARNING: {_metric(metric)} at temperature {name} leaves out {left_out} of {results['tasks']} "
                    "tasks, whose remaining samples are too few."
                )
    if "lenient_undecided" in results:
        lines.append(
            f"No lenient score at some temperature: judging of {results['lenient_undecided']} samples stopped before "
            "DeepMind's rule was decided; set stop_at_first_failure to false for it."
        )
    if results["sandbox"]["missing"]:
        lines.append(f"Protections not in use: {'; '.join(results['sandbox']['missing'])}.")
    return lines


def scores(results: dict) -> list[str]:
    """Returns the scores as Markdown: each temperature with intervals, the oracle named as one, the estimators."""
    fixed = results["fixed_temperature"]
    metrics = list(results["temperatures"][fixed]["metrics"])
    rows = []
    for temperature, of_temperature in results["temperatures"].items():
        label = f"{temperature} (fixed)" if temperature == fixed and len(results["temperatures"]) > 1 else temperature
        rows.append([label, *(_score(of_temperature["metrics"].get(metric)) for metric in metrics)])
    if len(results["temperatures"]) > 1:
        best = results["oracle"]["metrics"]
        rows.append(["oracle*", *(f"{_score(best[m])} at {best[m]['temperature']}" for m in metrics)])
    parts = [table(["temperature", *map(_metric, metrics)], rows)]
    bootstrap = results["bootstrap"]
    note = (
        f"Percent, with 95 % percentile bootstrap intervals over tasks ({bootstrap['resamples']} resamples, "
        f"seed {bootstrap['seed']}). pass@k is the unbiased estimator of Chen et al. (2021)."
    )
    if any("_at_" in metric and "pass" not in metric for metric in metrics):
        note += " n@k: n submissions out of k samples, filtered by the public tests (Li et al. 2022)."
    if any(metric.startswith("base") for metric in metrics):
        note += " Base: the dataset's own tests alone; without it, EvalPlus's plus tests count too (Liu et al. 2023)."
    if any(metric.startswith("lenient") for metric in metrics):
        note += " Lenient: DeepMind's comparison of outputs, beside the exact one."
    parts.append(note)
    if len(results["temperatures"]) > 1:
        parts.append(f"\\* Temperature {ORACLE_NOTE}.")
    tokens = results.get("tokens")
    if tokens:
        line = f"Tokens a sample: {tokens['per_sample']:.1f}."
        if "per_forward" in tokens:
            line += f" Tokens a forward pass: {tokens['per_forward']:.3f}."
        parts.append(line)
    return parts


def _unfinished(results: dict) -> list[str]:
    """Says how many samples end too early or define nothing asked for, where these are a tenth or more."""
    found, total, settings = results.get("unfinished", {}), results["samples"], results["settings"]
    cut, undefined = found.get("cut_off", 0), found.get("undefined", {"samples": 0})
    lines = []
    if 10 * cut >= total:
        lines.append(
            f"WARNING: {cut} of {total} samples ({_percent(cut / total)} %) fail and end in the middle: raise "
            "max_new_tokens where they are generated."
        )
    if 10 * undefined["samples"] >= total:
        count, first = undefined["samples"], undefined["first"]
        cleaned = settings.get("samples") is not None and settings.get("sanitize") == "auto"
        lines.append(
            f"WARNING: {count} of {total} samples ({_percent(count / total)} %) do not define what the tests "
            f"call (task {first['task_id']}: {first['asked']}, sample {first['sample']} defines "
            f"{', '.join(first['defined']) or 'nothing'}): ask for the name in the prompt"
            f"{', or try sanitize=off if the program was cut out of the text wrongly' * cleaned}."
        )
    return lines


def _verdict_table(results: dict) -> list[str]:
    rows = []
    for verdict in VERDICTS:
        count = results["verdicts"].get(verdict, 0)
        if count:
            cut = results["cut_at_max_tokens"].get(verdict, 0)
            rows.append([verdict, str(count), f"{100 * count / results['samples']:.1f} %", str(cut), _MEANING[verdict]])
    inside = results["judged_inside"]
    parts = ["## Verdicts", table(["verdict", "samples", "share", "of them cut at max_new_tokens", "meaning"], rows)]
    if inside["tasks"]:
        counted = ", ".join(f"{verdict} {count}" for verdict, count in inside["verdicts"].items())
        parts.append(f"Of these judged inside: {counted}. Tasks: {cell(', '.join(inside['task_ids']))}.")
    if results["exceptions"]:
        listed = ", ".join(f"{name} {count}" for name, count in list(results["exceptions"].items())[:12])
        parts.append(f"Exceptions: {listed}.")
    return parts


def _examples(tasks, samples, judgements, prompts) -> list[str]:
    """Returns the first samples of each verdict, of different tasks, failures first."""
    order = {task.task_id: position for position, task in enumerate(tasks)}
    in_order = sorted(samples, key=lambda s: (order[s.task_id], sort_key(s)))
    parts = ["## Examples"]
    for verdict in [*VERDICTS[1:], VERDICTS[0]]:
        chosen: dict[str, Sample] = {}
        for sample in in_order:
            if judgements[sample.key].verdict == verdict and len(chosen) < _EXAMPLES:
                chosen.setdefault(sample.task_id, sample)
        for sample in chosen.values():
            temperature = temperature_name(sample.temperature)
            inside = " (judged inside)" * (judgements[sample.key].judged == "inside")
            parts.append(
                f"### {verdict}{inside}: {cell(sample.task_id)}, temperature {temperature}, sample {sample.sample}"
            )
            if judgements[sample.key].detail:
                parts += ["Detail:", fenced(judgements[sample.key].detail, limit=500)]
            if sample.task_id in prompts:
                parts += ["End of the prompt:", fenced(prompts[sample.task_id], limit=_PROMPT_LIMIT, tail=True)]
            text = sample.solution if sample.completion is None else sample.completion
            ended = "" if sample.finish_reason is None else f" (ended by {cell(sample.finish_reason)})"
            parts += [
                f"{'Program' if sample.completion is None else 'Completion'}{ended}:",
                fenced(text, limit=_TEXT_LIMIT),
            ]
    return parts


def _protections(sandbox: dict) -> list[str]:
    if not sandbox["layers"] and not sandbox["missing"]:
        return ["Not recorded."]
    parts = [f"In use: {'; '.join(map(cell, sandbox['layers'])) or 'none'}."]
    return parts + [f"Not in use: {'; '.join(map(cell, sandbox['missing']))}."] * bool(sandbox["missing"])


def _metric(name: str) -> str:
    """Renames pass_at_10 to pass@10, and 10_at_100 to 10@100."""
    return name.replace("_at_", "@").replace("_", " ")


def _score(figure: dict | None) -> str:
    return "-" if figure is None else f"{_percent(figure['estimate'])} ({_interval(figure)})"


def _interval(figure: dict) -> str:
    return f"{_percent(figure['low'])} to {_percent(figure['high'])}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
