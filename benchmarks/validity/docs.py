"""From results to what is read: JSON lines, the tables and bars of docs/validity.md, its three figures."""

import json
import re
from pathlib import Path

from figures import report

from . import plots
from .faults import ALL, BALANCED

INTERVAL = "95 % interval"
_FAR = "far behind"  # how the policies are named that Rho-1 is for


def print_figures(stage: str, result: dict) -> None:
    """One JSON line per figure, the stage's bars last."""
    for name, value, unit, against in {"noise": _noise, "learning": _learning, "faults": _faults}[stage](result):
        report(f"{stage}: {name}", value, unit, against)
    for words, holds, shown in bars(stage, result):
        report(f"{stage}, bar: {words}", float(holds), "1 holds, 0 does not", shown)


def write_docs(out: Path, docs: Path) -> None:
    """Fill docs/validity.md's marked blocks and write its figures, from the full form where it has been run.

    Raises:
        FileNotFoundError: a stage has no result.
        ValueError: the page lacks a block.
    """
    page = (docs / "validity.md").read_text(encoding="utf-8")
    (docs / "figures").mkdir(exist_ok=True)
    for stage in ("noise", "learning", "faults"):
        form = next((f for f in ("full", "reduced") if (out / f / f"{stage}.json").exists()), None)
        if form is None:
            raise FileNotFoundError(f"{out} has no {stage}.json; run python benchmarks/weighting_validity.py {stage}")
        result = json.loads((out / form / f"{stage}.json").read_text())
        blocks = {"tables": tables(stage, result), "bars": _bar_table(stage, result), "run": _run_line(form, result)}
        for block, text in blocks.items():
            pattern = rf"(<!-- {stage} {block} -->\n).*?(<!-- end -->)"
            page, count = re.subn(pattern, lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page, flags=re.DOTALL)
            if count != 1:
                raise ValueError(f"validity.md must have one block <!-- {stage} {block} --> ... <!-- end -->")
        getattr(plots, stage)(result, docs / "figures" / f"validity_{stage}.svg")
    (docs / "validity.md").write_text(page, encoding="utf-8")


def tables(stage: str, result: dict) -> str:
    return {"noise": _noise_tables, "learning": _learning_tables, "faults": _fault_tables}[stage](result)


def bars(stage: str, result: dict) -> list[tuple[str, bool, str]]:
    """What was expected, whether it holds with its whole interval, and the figure it rests on."""
    return {"noise": _noise_bars, "learning": _learning_bars, "faults": _fault_bars}[stage](result)


def _run_line(form: str, result: dict) -> str:
    on = ", ".join(
        f"{value} {name}" if name == "threads" else f"{name} {value}" for name, value in result["versions"].items()
    )
    return f"{form.capitalize()} form, `{result['command']}`, {result['seconds'] / 60:.0f} minutes on {on}."


def _bar_table(stage: str, result: dict) -> str:
    rows = [[words, shown, "yes" if holds else "**no**"] for words, holds, shown in bars(stage, result)]
    return _table(["expected", f"figure and {INTERVAL}", "holds"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _show(triple, digits: int = 3, sign: bool = False) -> str:
    value, low, high = triple
    kind = f"{'+' if sign else ''}.{digits}f"
    return f"{value:{kind}} [{low:{kind}}, {high:{kind}}]"


# ----------------------------------------------------------------------------------------------------------------------
# Noise


def _noise(result: dict):
    for policy, found in result["policies"].items():
        for kind in ("weight", "score"):
            for name, figures in found["auc"][kind].items():
                low, high = figures["all"][1:]
                yield f"{policy}, {kind} {name}", figures["all"][0], "AUC", f"[{low:.3f}, {high:.3f}]; chance 0.5"


def ceiling(share: float, noise_share: float) -> float:
    """The AUC of `select` when every replaced token is among those it drops, ties counting half."""
    kept = share / (1 - noise_share)
    return kept + (1 - kept) / 2


def _noise_bars(result: dict) -> list[tuple[str, bool, str]]:
    out = []
    for policy, found in result["policies"].items():
        if not policy.startswith(_FAR):
            continue
        for kind, name in (("score", "excess"), ("weight", "soft excess")):
            value = found["auc"][kind][name]["all"]
            out.append((f"{policy}: {kind} of {name}, AUC >= 0.90", value[0] >= 0.90, _show(value)))
        rivals = (
            ("score", "abs_excess", "abs_excess"),
            ("score", "entropy", "entropy"),
            ("weight", "random_matched(soft excess)", "random weights"),
        )
        for kind, key, words in rivals:
            gain = found["auc"][kind][key]["excess minus this"]
            out.append((f"{policy}: signed excess above {words}", gain[1] > 0, _show(gain, sign=True)))
    return out


def _noise_tables(result: dict) -> str:
    policies = list(result["policies"])
    share = result["noise_share"]
    out = [
        f"{result['targets']} targets of {result['documents']} held-out functions, {share:.1%} of them replaced. "
        f"AUC with which a low weight finds a replaced token, {INTERVAL} over documents. Where `select` drops every "
        f"replaced token its AUC is {ceiling(0.6, share):.3f} at percentile 0.6 and {ceiling(0.7, share):.3f} at 0.7: "
        "it cannot order what it keeps.",
        _auc_table("weights of", result, policies, "weight", "all"),
        "The raw scores, which nothing ties or clips:",
        _auc_table("score", result, policies, "score", "all"),
        "The same scores on targets right after a replaced token, whose own context is broken, and on the rest:",
    ]
    rows = []
    for name in result["policies"][policies[0]]["auc"]["score"]:
        for group in ("after noise", "after clean"):
            aucs = [_show(result["policies"][p]["auc"]["score"][name][group]) for p in policies]
            rows.append([name, group, *aucs])
    out.append(_table(["score", "targets", *policies], rows))
    out.append("What lies behind it, mean cross-entropy in nats:")
    rows = []
    for policy in policies:
        kept, replaced = (result["policies"][policy]["ce"][k] for k in ("kept", "replaced"))
        gaps = [f"{x['policy'] - x['reference']:+.2f}" for x in (kept, replaced)]
        ces = [f"{x[who]:.2f}" for x in (kept, replaced) for who in ("policy", "reference")]
        rows.append([policy, ces[0], ces[1], gaps[0], ces[2], ces[3], gaps[1]])
    head = ["policy", "kept: policy", "reference", "excess", "replaced: policy", "reference", "excess"]
    return "\n\n".join([*out, _table(head, rows)])


def _auc_table(what: str, result: dict, policies: list[str], kind: str, group: str) -> str:
    names = result["policies"][policies[0]]["auc"][kind]
    rows = [[n, *(_show(result["policies"][p]["auc"][kind][n][group]) for p in policies)] for n in names]
    return _table([what, *policies], rows)


# ----------------------------------------------------------------------------------------------------------------------
# Learning


def _learning(result: dict):
    for policy, found in result["policies"].items():
        for name, figures in found["methods"].items():
            low, high = figures["minus_uniform_over_seeds"][1:]
            against = f"{policy}; minus uniform {figures['minus_uniform_over_seeds'][0]:+.3f} [{low:+.3f}, {high:+.3f}]"
            yield f"clean held-out CE after {name}", figures["ce"][0], "nats", against


def _learning_bars(result: dict) -> list[tuple[str, bool, str]]:
    out = []
    for policy, found in result["policies"].items():
        for name in found["methods"]:
            if name.startswith("select excess"):
                figures = found["methods"][name]
                both = figures["minus_uniform_over_seeds"], figures["minus_uniform_over_documents"]
                words = f"{policy}: {name} below uniform, over seeds and over documents"
                out.append((words, both[0][2] < 0 and both[1][2] < 0, " and ".join(_show(b, sign=True) for b in both)))
    return out


def _learning_tables(result: dict) -> str:
    settings = result["settings"]
    out = [
        f"{len(settings['seeds'])} seeds, {settings['steps']} steps of 2,048 tokens, {settings['share']:.0%} of the "
        f"target tokens replaced. Cross-entropy of head 1, in nats, on {result['held_out_targets']} targets of "
        f"{result['held_out_documents']} clean held-out functions; the reference has {result['reference_ce']:.3f}. "
        "Intervals of 95 %: Student's t over seeds (of the difference: paired by seed), and the bootstrap over "
        "held-out documents of the mean difference."
    ]
    for policy, found in result["policies"].items():
        out.append(f"Policy {policy}; before fine-tuning {found['before']:.3f}:")
        rows = [
            [
                name,
                _show(figures["ce"]),
                _show(figures["minus_uniform_over_seeds"], sign=True),
                _show(figures["minus_uniform_over_documents"], sign=True),
            ]
            for name, figures in sorted(found["methods"].items(), key=lambda item: item[1]["ce"][0])
        ]
        out.append(_table(["method", "clean CE", "minus uniform, seeds", "minus uniform, documents"], rows))
    return "\n\n".join(out)


# ----------------------------------------------------------------------------------------------------------------------
# Faults


def _faults(result: dict):
    for name, figures in result["methods"].items():
        for figure in ("top-1", "top-3", "top-5", "auc"):
            value, low, high = figures[figure]
            gap = figures[f"{figure} minus position"]
            yield (
                f"{name}, {figure}",
                value,
                "share",
                f"[{low:.3f}, {high:.3f}]; minus position {_show(gap, sign=True)}",
            )
    for name, value in result["pairwise_accuracy"].items():
        yield f"{name}, held-out pairwise accuracy", value[0], "share", f"[{value[1]:.3f}, {value[2]:.3f}]; chance 0.5"


def _fault_bars(result: dict) -> list[tuple[str, bool, str]]:
    return [
        (f"{critic}: above {other}, {figure}", gap[1] > 0, _show(gap, sign=True))
        for critic in (ALL, BALANCED)
        for other in ("random", "position", "control")
        for figure in ("top-1", "auc")
        for gap in [result["methods"][critic][f"{figure} minus {other}"]]
    ]


def _fault_tables(result: dict) -> str:
    figures = ("top-1", "top-3", "top-5", "auc")
    rows = [
        [name, *(_show(found[f]) for f in figures), _show(found["auc minus position"], sign=True)]
        for name, found in sorted(result["methods"].items(), key=lambda item: item[1]["auc"][0])
    ]
    accuracy = [[name, _show(value)] for name, value in result["pairwise_accuracy"].items()]
    chosen = [
        [
            str(c["fold"]),
            c["pairs"],
            " ".join(map(str, c["layers"])),
            *(c[key] for key in ("loss", "tokens", "rule")),
        ]
        for c in result["chosen"]
    ]
    return "\n\n".join(
        [
            f"{result['faulty_programs']} faulty programs with {result['lines']:.1f} non-blank lines on average, each "
            f"held out once, of {result['pairs']} pairs of {result['tasks']} tasks; {result['balanced_pairs']} of the "
            f"pairs are balanced by length; of all pairs of unequal length the correct program is the longer one in "
            f"{result['correct_is_longer']:.0%}. Top-k and AUC of the faulty line among the non-blank ones, {INTERVAL} "
            "over tasks:",
            _table(["ranked by", *figures, "AUC minus position"], rows),
            "Accuracy on the held-out balanced pairs (mean value of the correct program above that of the faulty one):",
            _table(["critic", f"accuracy and {INTERVAL}"], accuracy),
            "Chosen inside the training tasks of each fold:",
            _table(["fold", "pairs", "layers", "loss", "tokens", "rule"], chosen),
        ]
    )
