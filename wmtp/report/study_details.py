"""What a study's report shows beside figures: one example's token weights, and each cell's config and commands."""

import shlex
from pathlib import Path

import yaml

from wmtp.config import differences
from wmtp.errors import UserError, mask_secrets
from wmtp.report.parts import NAMED, Part
from wmtp.report.runs import Run
from wmtp.report.studies import Study
from wmtp.report.token_weights import read_token_weights
from wmtp.tracking.store import artifact_text, artifacts, clear_store_errors, existing_client, store_uri

_FOLDER = "token_weights"


def tokens(study: Study) -> Part:
    """One document under each cell's weights, from the pages that the runs have written."""
    title, pages, without = "One example under each method", {}, []
    for cell in study.shown(NAMED):
        page = _last_page(study.cells[cell][0])
        if page is None:
            without.append(cell)
        else:
            pages[cell] = read_token_weights(page)
    if not pages:
        missing = "No run has written pages of its token weights (token_view in its config)."
        return Part("tokens", title, missing=missing)
    first = next(iter(pages.values()))
    shared = [i for i in first if all(i in page for page in pages.values())]
    if not shared:
        return Part("tokens", title, missing=f"The pages of {', '.join(pages)} have no document in common.")
    document = next((i for i in shared if len(next(iter(first[i].values()))) >= 20), shared[0])
    columns = {}
    for cell, shown in pages.items():
        method, of = next(iter(shown[document].items()))
        columns[cell if method == "this run" else f"{cell}, {method}"] = of
    lead = (
        "Each token shaded by its weight at the last step that all pages show: blue below 1, orange and underlined "
        "above; plain text is no target." + f" No page: {', '.join(without)}." * bool(without)
    )
    return Part("tokens", title, lead, extra={"document": document, "columns": columns})


def _last_page(run: Run) -> str | None:
    if run.run_id != run.source:  # read from its folder
        files = sorted((Path(run.source) / _FOLDER).glob("step_*.html"))
        return files[-1].read_text(encoding="utf-8") if files else None
    with clear_store_errors(f"token pages of run {run.run_id} cannot be read", UserError):
        client = existing_client(store_uri(), UserError)
        names = sorted(artifacts(client, run.run_id, _FOLDER)) if _FOLDER in artifacts(client, run.run_id) else []
        return artifact_text(client, run.run_id, names[-1]) if names else None


def configs(study: Study) -> Part:
    """Each cell's config: what differs from the baseline's first, its hashes, and the commands that make its runs."""
    base = study.cells[study.baseline][0].settings
    found = []
    for cell, runs in study.cells.items():
        own = runs[0].settings
        facts = runs[0].facts
        names = ("git_commit", "config_sha256", "data_sha256", "own_code_sha256", "packages", "hardware")
        found.append(
            {
                "cell": cell,
                "differences": [] if cell == study.baseline else differences(base, own),
                "facts": {name: facts[name] for name in names if facts.get(name)},
                "config": mask_secrets(yaml.safe_dump(dict(runs[0].config), sort_keys=False, allow_unicode=True)),
                "commands": {run.seed: _command(study, run) for run in runs},
            }
        )
    lead = (
        "The keys whose values differ from the baseline's come first; then the commands that train each run again, at "
        "the commit named."
    )
    return Part("configs", "Configs and commands", lead, extra=found)


def _command(study: Study, run: Run) -> list[str]:
    """Returns the shell commands that train a run again: the sweep's own, or one on the config that the run kept."""
    row = study.rows.get((run.cell, run.seed), {})
    if row.get("command"):
        return [row["command"]]
    recipe = run.facts.get("recipe") or Path(str(study.sweep.get("recipe") or "full_finetune_distributed_wmtp")).stem
    output = f"runs/again/{run.cell}/seed-{run.seed}"
    lines, config = [], f"{run.source}/config.yaml"
    if run.run_id == run.source:
        download = ["mlflow", "artifacts", "download", "--run-id", run.source]
        lines = [[*download, "--artifact-path", "config.yaml", "--dst-path", output]]
        config, output = f"{output}/config.yaml", f"{output}/run"
    processes = str(run.facts.get("world_size") or 1)
    train = ["tune", "run", "--nproc_per_node", processes, f"recipes/{recipe}.py", "--config", config]
    lines.append([*train, f"output_dir={output}", "tracking=null"])
    return [shlex.join(line) for line in lines]
