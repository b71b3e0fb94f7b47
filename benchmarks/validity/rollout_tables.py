"""The figures of benchmarks/rollouts.py: as lines, and as the tables of docs/validity.md."""

import json
from pathlib import Path

from .marked_blocks import with_blocks

FIGURES = ("top-1", "auc", "mean rank")


def print_figures(result: dict) -> None:
    from figures import report

    for name, figures in result["faults"]["methods"].items():
        against = f"AUC of the faulty line, 95 % {show(figures['auc'])}"
        report(f"rollouts, faults: {name}", figures["auc"][0], "AUC", against)
    for name, figures in result.get("learning", {}).get("methods", {}).items():
        against = f"clean held-out CE minus uniform's, 95 % {show(figures['ce minus uniform'], 4, sign=True)}"
        report(f"rollouts, learning: {name}", figures["ce minus uniform"][0], "nats", against)


def tables(result: dict) -> str:
    """Returns the tables of docs/validity.md."""
    return "\n".join(_faults(result) + (_learning(result) if "learning" in result else []))


def _faults(result: dict) -> list[str]:
    model, faults = result["model"], result["faults"]
    lines = [
        f"{faults['programs']} faulty programs with {faults['lines']:.1f} lines to rank on average, "
        f"{result['samples']} completions at each line's end ({model['completions']} in all, {model['new_tokens']} "
        f"tokens, {model['seconds']} s on one thread of a busy machine). The model ({model['parameters'] / 1e6:.1f} "
        f"million parameters; {result['mistakes']:.0%} of the statements that it has read were wrong) solves "
        f"{model['greedy_pass_rate']:.0%} of held-out tasks greedily; its mean pass rate at the prompts is "
        f"{model['prompt_value']:.2f}, and 0 in {model['never_solved']:.0%} of the tasks. The faulty line among the "
        "lines, 95 % interval over programs:",
        "",
        "| ranked by | top-1 | AUC | mean rank | rollouts' AUC minus it |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, figures in sorted(faults["methods"].items(), key=lambda item: item[1]["auc"][0]):
        gap = "" if name == "rollouts" else show(figures["rollouts' auc minus it"], sign=True)
        lines.append(f"| {name} | {' | '.join(show(figures[f]) for f in FIGURES)} | {gap} |")
    return lines


def _learning(result: dict) -> list[str]:
    learning = result["learning"]
    ce, passing = learning["before"]
    lines = [
        "",
        f"Fine-tuning on these programs, {learning['steps']} steps, {result['seeds']} seeds; before it CE {ce:.4f} and "
        f"pass rate {passing:.3f} (four samples of each held-out task, temperature 1). Student's t over seeds, paired "
        "with uniform:",
        "",
        "| weights | clean held-out CE | minus uniform | pass rate | minus uniform |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, figures in sorted(learning["methods"].items(), key=lambda item: item[1]["ce"][0]):
        of_ce, of_tasks = (
            show(figures["ce minus uniform"], 4, sign=True),
            show(figures["pass rate minus uniform"], sign=True),
        )
        if name == "uniform":
            of_ce = of_tasks = ""
        lines.append(f"| {name} | {show(figures['ce'], 4)} | {of_ce} | {show(figures['pass rate'])} | {of_tasks} |")
    lines += ["", "Rollouts minus, paired by seed:", "", "| | CE | pass rate |", "| --- | --- | --- |"]
    for name, (of_ce, of_tasks) in learning["rollouts minus"].items():
        lines.append(f"| {name} | {show(of_ce, 4, sign=True)} | {show(of_tasks, sign=True)} |")
    lines += ["", "Mean weight of a token:", "", "| | wrong line | right line in a rare form | other lines |"]
    lines.append("| --- | --- | --- | --- |")
    lines += [f"| {name} | {' | '.join(f'{w:.2f}' for w in three)} |" for name, three in learning["weights"].items()]
    return lines


def show(triple, digits: int = 3, sign: bool = False) -> str:
    kind = f"{'+' if sign else ''}.{digits}f"
    return f"{triple[0]:{kind}} [{triple[1]:{kind}}, {triple[2]:{kind}}]"


def models(results: list[dict]) -> str:
    """Returns a table of models, one row each, that were trained otherwise: who finds the faulty line."""
    rivals = ("rollouts", "max surprisal", "pair critic, chosen", "position")
    lines = [
        f"| steps, share of mistakes | solves | prompts' value | {' | '.join(rivals)} | rollouts minus max surprisal |",
        f"| --- | --- | --- |{' --- |' * (len(rivals) + 1)}",
    ]
    for result in sorted(results, key=lambda result: result["model"]["prompt_value"]):
        model, methods = result["model"], result["faults"]["methods"]
        aucs = " | ".join(show(methods[name]["auc"]) for name in rivals)
        gap = show(methods["max surprisal"]["rollouts' auc minus it"], sign=True)
        lines.append(
            f"| {result['steps']}, {result['mistakes']:.0%} | {model['greedy_pass_rate']:.0%} | "
            f"{model['prompt_value']:.2f} | {aucs} | {gap} |"
        )
    return "\n".join(lines)


def write_docs(folders: list[Path], page: Path) -> None:
    """Fills the page's blocks: the tables of the first folder's result, and the models of all.

    Raises:
        FileNotFoundError: there is no result.
        ValueError: the page lacks a block.
    """
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    blocks = {"rollouts tables": tables(results[0]), "rollouts models": models(results)}
    blocks = {mark: f"\n{shown}\n" for mark, shown in blocks.items()}
    page.write_text(with_blocks(page.read_text(), blocks, page.name))
