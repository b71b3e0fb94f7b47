"""From results to what is read: JSON lines, the tables and bars of docs/validity.md, its figures; docs/methods.md."""

import json
from pathlib import Path

from . import methods_page, plots
from .faults import ALL, BALANCED
from .marked_blocks import with_blocks
from .methods import CONTROL_PAIRS

INTERVAL = "95 % interval"
_FAR = "far behind"  # how the policies are named that Rho-1 is for


def print_figures(stage: str, result: dict) -> None:
    """One JSON line per figure, the stage's bars last."""
    from figures import report  # of benchmarks/, which is on the path of its own scripts alone

    for name, value, unit, against in _FIGURES[stage](result):
        report(f"{stage}: {name}", value, unit, against)
    for words, holds, shown in bars(stage, result):
        report(f"{stage}, bar: {words}", float(holds), "1 holds, 0 does not", shown)


def write_docs(out: Path, docs: Path) -> None:
    """Fill docs/validity.md's marked blocks and docs/methods.md, and write their figures, from the full form's results.

    What has no result in ``out`` stays as it is.

    Raises:
        FileNotFoundError: no stage has a result.
        ValueError: a page lacks a block.
    """
    results = {
        stage: json.loads(path.read_text()) for stage in _FIGURES if (path := out / "full" / f"{stage}.json").exists()
    }
    if not results:
        raise FileNotFoundError(f"{out}/full has no result; run python benchmarks/weighting_validity.py all --full")
    page = (docs / "validity.md").read_text(encoding="utf-8")
    (docs / "figures").mkdir(exist_ok=True)
    if "side_by_side" in results:
        results["side_by_side"] = methods_page.write(results["side_by_side"], results.get("noise"), docs)
    for stage, result in results.items():
        page = filled(page, stage, result)
        getattr(plots, stage)(result, docs / "figures" / f"validity_{stage}.svg")
    (docs / "validity.md").write_text(page, encoding="utf-8")


def filled(page: str, stage: str, result: dict) -> str:
    """docs/validity.md with a stage's blocks written anew.

    Raises:
        ValueError: the page lacks a block.
    """
    blocks = {"tables": tables(stage, result), "bars": _bar_table(stage, result), "run": _run_line(result)}
    return with_blocks(page, {f"{stage} {block}": f"\n{text}\n" for block, text in blocks.items()}, "validity.md")


def tables(stage: str, result: dict) -> str:
    return _TABLES[stage](result)


def bars(stage: str, result: dict) -> list[tuple[str, bool, str]]:
    """What was expected, whether it holds with its whole interval, and the figure it rests on."""
    return _BARS[stage](result)


def _run_line(result: dict) -> str:
    on = ", ".join(
        f"{value} {name}" if name == "threads" else f"{name} {value}" for name, value in result["versions"].items()
    )
    took = f"{result['seconds'] / 60:.0f} minutes"
    if "cpu_seconds" in result:  # of what was computed, on however busy a machine
        took = f"{result['cpu_seconds'] / 60:.0f} minutes of a core"
    return f"Full form, `{result['command']}`, {took} on {on}."


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


# ----------------------------------------------------------------------------------------------------------------------
# Side by side


def _side_by_side(result: dict):
    for name, found in result["methods"].items():
        for text in ("code", "prose"):
            minus = _show(found[f"{text} minus uniform"]["mean"], sign=True)
            yield f"{text} CE after {name}", found[text][0], "nats", f"minus uniform {minus}"
        if "accept length" in found:
            against = _show(found["accept length minus uniform"]["mean"], sign=True)
            yield f"tokens a forward after {name}", found["accept length"][0], "tokens", f"minus uniform {against}"
    for name, share in result["ends"]["shares"].items():
        yield f"texts that run to the limit after {name}", share[0], "share", f"[{share[1]:.3f}, {share[2]:.3f}]"


def _side_by_side_bars(result: dict) -> list[tuple[str, bool, str]]:
    """Expectations of before the first run; of the controls, of before theirs."""
    out = []
    methods = result["methods"]
    ahead = ["oracle", "select excess", "protect(select excess)", "soft excess", "emphasis excess", "token_cleaning"]
    for name, sign in [*((name, -1) for name in ahead), ("dft", 1), ("dft, raw", 1)]:
        if name in methods:
            found = methods[name]["code minus uniform"]
            words = f"clean code: {name} {'below' if sign < 0 else 'above'} uniform, after Holm"
            out.append((words, found["p"] < 0.05 and sign * found["mean"][0] > 0, _show(found["mean"], sign=True)))
    pairs = {(name, other): result["pairs"].get(f"{name} minus {other}") for name, other in CONTROL_PAIRS}
    below = [
        (f"clean code: {name} below {other}, after Holm", pair["code"])
        for (name, other), pair in pairs.items()
        if pair and name != "token_cleaning"  # of which nothing was expected here: it had ended behind `uniform`
    ]
    below += [
        (f"clean code, fresh seeds: {name} below uniform, after Holm over these", found["code"])
        for name, found in result["confirmed"].items()
    ]
    for words, found in below:
        out.append((words, found["p"] < 0.05 and found["mean"][0] < 0, _show(found["mean"], sign=True)))
    found = methods["select excess"]["prose minus uniform"]
    out.append(("prose: select excess below uniform", found["mean"][2] < 0, _show(found["mean"], sign=True)))
    gaps = result["ends"]["gaps"]
    for name, sign in (("select excess minus uniform", 1), ("protect(select excess) minus select excess", -1)):
        mean = gaps[name]["mean"]
        words = f"texts that run to the limit: {name} {'above' if sign > 0 else 'below'} zero"
        out.append((words, (mean[1] if sign > 0 else -mean[2]) > 0, _show(mean, sign=True)))
    return out


def _p(difference: dict) -> str:
    return f"{difference['p']:.2g}" if difference["p"] >= 1e-4 else "< 0.0001"


def _side_by_side_tables(result: dict) -> str:
    settings, code, prose = result["settings"], result["held_out"]["code"], result["held_out"]["prose"]
    shares, gaps = result["ends"]["shares"], result["ends"]["gaps"]
    rows = [[f"`{name}`", _show(share)] for name, share in shares.items()]
    rows += [[" minus ".join(f"`{part}`" for part in name.split(" minus ")), _show(gap["mean"], sign=True)]
             for name, gap in gaps.items()]  # fmt: skip
    controls = [" minus ".join(pair) for pair in CONTROL_PAIRS if " minus ".join(pair) in result["pairs"]]
    against = []
    for name in controls:
        found = result["pairs"][name]
        figures = methods_page.gap(found["code"]), _p(found["code"]), methods_page.gap(found["prose"])
        against.append([*(f"`{part}`" for part in name.split(" minus ")), str(found["seeds"]), *figures])
    again = [
        [f"`{name}`", methods_page.gap(found["code"]), _p(found["code"]), methods_page.gap(found["prose"])]
        for name, found in result["confirmed"].items()
    ]
    confirmation = (
        f"On {len(settings['fresh_seeds'])} fresh seeds, minus `uniform`, in nats; **bold**: found after Holm over the "
        f"{len(again)} differences of the column:",
        _table(["method", "clean code", "p, Holm", "prose"], again),
    )
    pairs = [
        [" minus ".join(f"`{part}`" for part in name.split(" minus "))]
        + [_show(found[column]["mean"], sign=True) for column in ("code", "prose", "to the limit")]
        for name, found in result["pairs"].items()
        if name not in controls
    ]
    return "\n\n".join(
        [
            f"{len(settings['seeds'])} seeds, {settings['steps']} steps of {settings['batch_size']} rows of 256 "
            f"tokens. Held out: {code[1]} targets of {code[0]} functions, {prose[1]} of {prose[0]} pieces of prose; "
            f"{result['prompts']} functions' signatures and docstrings, continued greedily by up to "
            f"{settings['max_new_tokens']} tokens. Each method that a claim is made of minus its controls, in nats; "
            f"**bold**: found after Holm's adjustment over the {len(controls)} differences of the column:",
            _table(["method", "minus its control", "seeds", "clean code", "p, Holm", "prose"], against),
            *(confirmation if again else ()),
            "Other differences that are not with `uniform`, in nats and in shares:",
            _table(["difference", "clean code", "prose", "texts that run to the limit"], pairs),
            f"Texts that run to the limit, {len(settings['end_seeds'])} seeds and {result['prompts']} prompts:",
            _table(["weights", f"share and {INTERVAL}"], rows),
        ]
    )


_FIGURES = {"noise": _noise, "learning": _learning, "faults": _faults, "side_by_side": _side_by_side}
_BARS = {"noise": _noise_bars, "learning": _learning_bars, "faults": _fault_bars, "side_by_side": _side_by_side_bars}
_TABLES = {
    "noise": _noise_tables,
    "learning": _learning_tables,
    "faults": _fault_tables,
    "side_by_side": _side_by_side_tables,
}
