"""The numbers of an evaluation, from its tasks, samples and judgements alone.

An evaluation that was killed and resumed gives the same dictionary: nothing in it depends on time or on order.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

from wmtp.errors import UserError
from wmtp.eval.estimators import n_at_k, oracle_temperature, paired_difference, pass_at_k
from wmtp.eval.protocols import Task
from wmtp.eval.samples import Judgement, Key, Sample, sort_key, why_unreadable
from wmtp.eval.sanitize import breaks_off, defines
from wmtp.eval.stdio_tasks import StdioTask
from wmtp.numerics.bootstrap import Interval, bootstrap_interval
from wmtp.sandbox import Verdict

VERDICTS = get_args(Verdict)
ORACLE_NOTE = "chosen on the test score itself: optimistic, not to be compared with a temperature fixed beforehand"
# Settings that must be equal for two evaluations to be compared, beside the protocol. Those of the model (checkpoint,
# model, tokenizer), of the computation (dtype, drafts) and the seed may differ.
_SAME = (
    *("tasks_sha256", "fixed_temperature", "top_p", "max_new_tokens", "samples_per_task"),
    *("limits", "gt_time_limit_factor", "min_time_limit"),
)
_NO_PYTHON = ("SyntaxError", "IndentationError", "TabError")
_DEFINITION = re.compile(r"^(?:async def|def|class)[ \t]+(\w+)", re.MULTILINE)
_EXCEPTION = re.compile(r"\b[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Iteration|Warning)\b")


def evaluation_results(
    tasks: Sequence[Task],
    samples: Sequence[Sample],
    judgements: Mapping[Key, Judgement],
    *,
    ks: Sequence[int] = (1,),
    n_at_ks: Sequence[tuple[int, int]] = (),
    fixed_temperature: float | None = None,
    seed: int = 0,
    resamples: int = 10_000,
    settings: Mapping[str, object] | None = None,
    sandbox: Mapping[str, Sequence[str]] | None = None,
    of_tasks: int | None = None,
) -> dict:
    """Returns all findings of an evaluation, as JSON values in a fixed order.

    Args:
        tasks: all tasks of the benchmark; each needs a sample at every temperature.
        samples: of the tasks, each with a judgement.
        judgements: by :attr:`wmtp.eval.samples.Sample.key`.
        ks: report pass@k for these.
        n_at_ks: report n@k for these pairs (n submissions, k samples); needs judgements with `passes_public`.
        fixed_temperature: the headline's; None where all samples have one temperature.
        seed, resamples: of the bootstrap over tasks.
        settings: of the run, JSON values, kept as they are.
        sandbox: {"layers": [...], "missing": [...]}, protections in use and not in use.
        of_tasks: how many tasks the benchmark has, where only those with samples are given.

    A `harness_error` is not the model's failure: such samples are left out of n and counted as
    `excluded_harness_errors`. A task with fewer than k samples left does not count for pass@k: `tasks` of each figure
    says how many do. Where every stdio sample was judged to the end, `lenient_pass_at_k` is pass@k under DeepMind's
    rule of comparison. Where all tasks have plus tests (MBPP+), `base_pass_at_k` is pass@k by the base tests alone.

    Tasks judged with their tests inside the program's process are listed as `judged_inside`; where there are any,
    `protected_metrics` has each figure over the other tasks alone.

    Raises:
        ValueError: a task without samples at a temperature, a sample without a judgement or of no task, k larger than
            the number of samples of a task, several temperatures and no fixed one, or no task left for a figure.
    """
    fixed_temperature = check_samples(tasks, samples, ks=ks, n_at_ks=n_at_ks, fixed_temperature=fixed_temperature)
    for sample in samples:
        if sample.key not in judgements:
            raise ValueError(f"sample {sample.sample} of task {sample.task_id} was not judged; judge it first")
    judged_inside = [sample for sample in samples if judgements[sample.key].judged == "inside"]
    inside = {sample.task_id for sample in judged_inside}
    tables, over = {}, partial(_over_tasks, seed=seed, resamples=resamples)
    for temperature, by_task in _by_temperature(tasks, samples).items():
        counts = [_counts(task_id, of_task, judgements) for task_id, of_task in by_task.items()]
        figures = list(_metrics(counts, ks, n_at_ks))
        tables[temperature] = {
            "samples_per_task": [min(map(len, by_task.values())), max(map(len, by_task.values()))],
            "metrics": {name: over(name, counts, k, value) for name, k, value in figures},
            **_totals([sample for of_task in by_task.values() for sample in of_task], judgements),
            "per_task": counts,
        }
        protected = [c for c in counts if c["task_id"] not in inside]
        if inside and protected:
            known = [figure for figure in figures if any(c["n"] >= figure[1] for c in protected)]
            tables[temperature]["protected_metrics"] = {name: over(name, protected, k, of) for name, k, of in known}
    oracle = {}
    for name in tables[fixed_temperature]["metrics"]:
        scores = {t: table["metrics"][name]["estimate"] for t, table in tables.items() if name in table["metrics"]}
        best = oracle_temperature(scores)
        oracle[name] = {"temperature": temperature_name(best), **tables[best]["metrics"][name]}
    return {
        "settings": dict(settings or {}),
        "sandbox": {name: list((sandbox or {}).get(name, ())) for name in ("layers", "missing")},
        "tasks": len(tasks),
        "of_tasks": len(tasks) if of_tasks is None else of_tasks,
        "samples": len(samples),
        "judged_inside": {
            "tasks": len(inside),
            "task_ids": [task.task_id for task in tasks if task.task_id in inside],
            "verdicts": _verdicts(judgements[sample.key] for sample in judged_inside),
        },
        "excluded_harness_errors": sum(judgements[s.key].verdict == "harness_error" for s in samples),
        "bootstrap": {"over": "tasks", "seed": seed, "resamples": resamples, "level": 0.95},
        "fixed_temperature": temperature_name(fixed_temperature),
        "temperatures": {temperature_name(temperature): table for temperature, table in tables.items()},
        "oracle": {"note": ORACLE_NOTE, "metrics": oracle},
        **_totals(samples, judgements),
        **_unreadable(tasks, samples, judgements, settings or {}),
        **_unfinished(tasks, samples, judgements),
    }


def check_samples(
    tasks: Sequence[Task],
    samples: Sequence[Sample],
    *,
    ks: Sequence[int] = (1,),
    n_at_ks: Sequence[tuple[int, int]] = (),
    fixed_temperature: float | None = None,
) -> float | None:
    """Refuses samples that :func:`evaluation_results` could not report, before the work of judging them.

    Returns:
        The fixed temperature: the given one, or the only one.

    Raises:
        ValueError: as :func:`evaluation_results`, in so far as no judgement is needed to see it.
    """
    if not tasks or not samples:
        raise ValueError(f"nothing to report: {len(tasks)} tasks, {len(samples)} samples")
    if n_at_ks and not all(isinstance(task, StdioTask) for task in tasks):
        raise UserError("n@k needs to know which samples pass the public tests, which only stdio tasks have")
    grouped = _by_temperature(tasks, samples)
    for temperature, by_task in grouped.items():
        task_id, fewest = min(((i, len(of_task)) for i, of_task in by_task.items()), key=lambda pair: pair[1])
        for k in [*ks, *(k for _, k in n_at_ks)]:
            if not 1 <= k <= fewest:
                raise UserError(
                    f"pass@k and n@k need k samples of every task, got k = {k}; task {task_id} has {fewest} at "
                    f"temperature {temperature_name(temperature)}: lower k, or add samples"
                )
    if fixed_temperature is None and len(grouped) == 1:
        [fixed_temperature] = grouped
    if fixed_temperature not in grouped:
        there = ", ".join(map(temperature_name, grouped))
        if list(grouped) == [None]:
            way_out = "the samples do not say their temperature; set it to null"
        elif fixed_temperature is None:
            way_out = f"the samples have several temperatures; set it to the one that the headline reports, of {there}"
        else:
            way_out = f"no sample has that temperature; set it to one of {there}"
        given = "null" if fixed_temperature is None else fixed_temperature
        raise UserError(f"fixed_temperature is {given}, but {way_out}")
    return fixed_temperature


def compare_results(ours: dict, theirs: dict, k: int = 1, *, seed: int = 0, resamples: int = 10_000) -> Interval:
    """Computes the paired difference in pass@k, ours - theirs, from the results.json of two evaluations alike.

    Each is taken at its fixed temperature.

    Raises:
        ValueError: the runs have other tasks than each other, judged some in other modes, or too few samples for k.
    """
    if reason := _judged_apart(ours, theirs):
        raise UserError(reason)
    values = [figure_by_task(results, f"pass_at_{k}") for results in (ours, theirs)]
    return paired_difference(*values, seed, resamples=resamples)


def why_not_alike(ours: dict, theirs: dict) -> str | None:
    """Returns why two evaluations' figures cannot be compared: the first setting that differs, with both values.

    None where they can be: the same tasks, judged alike, under the same protocol.
    """
    our, their = (
        {
            **results["settings"],
            "fixed_temperature": (name := results["fixed_temperature"]),
            "samples_per_task": results["temperatures"][name].get("samples_per_task"),
        }
        for results in (ours, theirs)
    )
    # A path in a protocol may differ from machine to machine; equal prompts, token by token, prove equal protocols.
    protocols = [settings.get("protocol") or {} for settings in (our, their)]
    same_prompts = our.get("prompts_sha256") == their.get("prompts_sha256")
    same_protocol = same_prompts and len({p.get("_component_") for p in protocols}) == 1
    for key in (*_SAME, *(() if same_protocol else ("protocol",))):
        if our.get(key) != their.get(key):
            return f"{key} {_short(our.get(key))} and {_short(their.get(key))}; evaluate alike"
    return _judged_apart(ours, theirs)


def figure_by_task(results: dict, figure: str) -> dict[str, float]:
    """Returns a figure of each task that has samples enough for it, from results.json, at the fixed temperature.

    Args:
        figure: such as ``pass_at_10``, ``5_at_10`` or ``base_pass_at_1``; k need not be one that was reported.

    Raises:
        UserError: no such figure.
    """
    fixed = results["temperatures"][results["fixed_temperature"]]
    counts = fixed["per_task"]
    if parsed := re.fullmatch(r"(?:(\d+)|\w*pass)_at_(\d+)", figure):
        n, k = (int(number or 0) for number in parsed.groups())
        n_at_ks = [(n, k)] if n and all("public" in c for c in counts) else []
        for known, needed, value in _metrics(counts, [k], n_at_ks):
            if known == figure and k:
                return {c["task_id"]: value(c) for c in counts if c["n"] >= needed}
    there = ", ".join(fixed["metrics"])
    raise UserError(f"these results have no figure {figure!r}; there are {there}")


def temperature_name(temperature: float | None) -> str:
    """Returns a temperature as a key of results.json."""
    return "unknown" if temperature is None else repr(float(temperature))


def _by_temperature(tasks, samples) -> dict[float | None, dict[str, list[Sample]]]:
    """Sorts samples by temperature, then by task in the order of the tasks, then by index."""
    task_ids = [task.task_id for task in tasks]
    known = set(task_ids)
    grouped: dict[float | None, dict[str, list[Sample]]] = {}
    for sample in sorted(samples, key=lambda s: (-1.0 if s.temperature is None else s.temperature, sort_key(s))):
        if sample.task_id not in known:
            raise UserError(f"a sample is of task {sample.task_id}, which is none of the {len(tasks)} tasks")
        grouped.setdefault(sample.temperature, {i: [] for i in task_ids})[sample.task_id].append(sample)
    for temperature, by_task in grouped.items():
        absent = [task_id for task_id, of_task in by_task.items() if not of_task]
        if absent:
            raise UserError(
                f"no sample at temperature {temperature_name(temperature)} for {len(absent)} of {len(tasks)} tasks, "
                f"the first is {absent[0]}; sample every task at every temperature"
            )
    return grouped


def _counts(task_id: str, samples: Sequence[Sample], judgements: Mapping[Key, Judgement]) -> dict:
    """Returns n and the numbers of successes of a task, of the samples that count."""
    all_judged = [judgements[sample.key] for sample in samples]
    judged = [judgement for judgement in all_judged if judgement.verdict != "harness_error"]
    counts = {"task_id": task_id, "n": len(judged), "correct": sum(j.verdict == "passed" for j in judged)}
    for kind in ("public", "lenient", "base"):
        passes = [getattr(judgement, f"passes_{kind}") for judgement in judged]
        if None not in passes:
            counts[kind] = sum(passes)
    return counts | {"verdicts": _verdicts(all_judged)}


def _metrics(counts: list[dict], ks, n_at_ks) -> Iterable[tuple[str, int, Callable[[dict], float]]]:
    """Returns name, samples needed, and value of a task's counts, of each figure to report."""
    for k in ks:
        yield f"pass_at_{k}", k, lambda c, k=k: pass_at_k(c["n"], c["correct"], k)
    for n, k in n_at_ks:
        yield f"{n}_at_{k}", k, lambda c, n=n, k=k: n_at_k(c["n"], c["public"], c["correct"], n, k)
    for kind in ("base", "lenient"):
        if all(kind in c for c in counts):
            for k in ks:
                yield f"{kind}_pass_at_{k}", k, lambda c, k=k, kind=kind: pass_at_k(c["n"], c[kind], k)


def _over_tasks(name: str, counts: list[dict], k: int, value: Callable, seed: int, resamples: int) -> dict:
    values = [value(c) for c in counts if c["n"] >= k]
    if not values:
        raise UserError(f"{name}: no task has {k} samples that the judge could judge; look at the harness errors")
    return {**asdict(bootstrap_interval(values, seed, resamples=resamples)), "tasks": len(values)}


def _totals(samples: Sequence[Sample], judgements: Mapping[Key, Judgement]) -> dict:
    judged = [judgements[sample.key] for sample in samples]
    cut = Counter(judgements[s.key].verdict for s in samples if s.finish_reason == "length")
    exceptions = Counter(
        found.group() if (found := _EXCEPTION.search(j.detail)) else "other" for j in judged if j.verdict == "exception"
    )
    totals = {
        "verdicts": _verdicts(judged),
        "cut_at_max_tokens": {verdict: cut[verdict] for verdict in VERDICTS if cut[verdict]},
        "exceptions": dict(sorted(exceptions.items(), key=lambda item: (-item[1], item[0]))),
    }
    undecided = sum(j.passes_public is not None and j.passes_lenient is None for j in judged)
    if undecided:
        totals["lenient_undecided"] = undecided  # judging stopped at a test that fails exactly, but not leniently
    if all(sample.tokens is not None for sample in samples):
        tokens = sum(sample.tokens for sample in samples)
        totals["tokens"] = {"total": tokens, "per_sample": tokens / len(samples)}
        if all(sample.forwards is not None for sample in samples):
            forwards = sum(sample.forwards for sample in samples)
            totals["tokens"] |= {"forwards": forwards, "per_forward": tokens / forwards if forwards else 0.0}
    return totals


def _unreadable(tasks, samples, judgements, settings: Mapping[str, Any]) -> dict:
    """Says how many samples are no Python, and why, where these are most: then the score says nothing of the model."""
    details = ((sample, judgements[sample.key].detail) for sample in samples)
    broken = [
        sample for sample, detail in details if (found := _EXCEPTION.search(detail)) and found.group() in _NO_PYTHON
    ]
    if 2 * len(broken) <= len(samples):
        return {}
    cleaned = settings.get("samples") is not None and settings.get("sanitize") == "auto"
    protocol = (settings.get("protocol") or {}).get("_component_")
    cause = why_unreadable({task.task_id: task for task in tasks}, broken, cleaned=cleaned, protocol=protocol)
    return {"unreadable": {"samples": len(broken), "likely_cause": cause}}


def _unfinished(tasks, samples, judgements) -> dict:
    """Counts the samples that fail because they end too early, or define nothing of the name that the tests call."""
    by_id = {task.task_id: task for task in tasks}
    cut, undefined = [], []
    for sample in samples:
        if judgements[sample.key].verdict in ("passed", "harness_error"):
            continue
        entry = re.match(r"\w+", getattr(by_id[sample.task_id], "entry_point", None) or "")
        name = entry.group() if entry else None
        last = _DEFINITION.findall(sample.text)[-1:]
        ended = sample.finish_reason == "length" or (sample.finish_reason is None and breaks_off(sample.text))
        if ended and (not last or name in (None, *last)):  # else what is cut off comes after the answer
            cut.append(sample)
        elif name is not None and not defines(sample.solution, name):
            undefined.append((name, sample))
    found: dict[str, Any] = {"cut_off": len(cut)} if cut else {}
    if undefined:
        name, sample = undefined[0]
        instead = list(dict.fromkeys(_DEFINITION.findall(sample.solution)))[:3]
        found["undefined"] = {
            "samples": len(undefined),
            "first": {"task_id": sample.task_id, "sample": sample.sample, "asked": name, "defined": instead},
        }
    return {"unfinished": found} if found else {}


def _verdicts(judged: Iterable[Judgement]) -> dict[str, int]:
    counts = Counter(judgement.verdict for judgement in judged)
    unknown = sorted(counts.keys() - set(VERDICTS))
    if unknown:
        raise UserError(f"verdict {unknown[0]!r} is none of {', '.join(VERDICTS)}")
    return {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]}


def _judged_apart(ours: dict, theirs: dict) -> str | None:
    inside = [set(results.get("judged_inside", {}).get("task_ids", ())) for results in (ours, theirs)]
    if inside[0] == inside[1]:
        return None
    return (
        f"task {min(inside[0] ^ inside[1])} is judged inside in one of the runs and protected in the other, which "
        "cannot be compared; evaluate both with the same tests=protected|inside"
    )


def _short(value: object) -> str:
    text = json.dumps(value, default=str) if isinstance(value, Mapping | list) else str(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-12:]}"
