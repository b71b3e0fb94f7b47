"""Registers evaluated models, and moves the aliases `staging` and `production` by a rule, on record and reversibly.

    tune run --nproc_per_node 1 recipes/promote.py --config configs/tiny/promote.yaml evaluation_run=<run id>
    python recipes/promote.py --config configs/tiny/promote.yaml action=production evaluation_run=<run id>
    python recipes/promote.py --config configs/tiny/promote.yaml action=rollback
    python recipes/promote.py --config configs/tiny/promote.yaml action=show

`register` takes an evaluation run, fetches the export that it evaluated, makes a version of it with a model card, and
sets `staging`. `production` sets that alias, unless the evaluation is worse than that of the version which has it by
more than chance explains. Both read everything from MLflow: no file of the training machine is needed.
"""

import os
import sys

import wmtp  # noqa: F401  # isort: skip  # first: it silences what torchtune says when it is imported
from omegaconf import DictConfig

from wmtp import config
from wmtp.config import ConfigError, ConfigReader, build
from wmtp.errors import clear_errors
from wmtp.registry.card import Statements, model_card, publish_card
from wmtp.registry.promotion import Evaluation, evaluated_export, not_worse, read_evaluation
from wmtp.registry.versions import (
    Choice,
    Move,
    RegistryError,
    aliased,
    check_name,
    done_moves,
    ensure_version,
    find_version,
    last_move,
    move_alias,
    moves,
    open_store,
    read_version,
    shown,
    versions,
)
from wmtp.tracking.environment import login_name

ACTIONS = ("register", "production", "rollback", "show")


class PromoteRecipe:
    """Order of events: read the config, `setup` (the store), then the one action."""

    def __init__(self, cfg: DictConfig) -> None:
        """Reads and checks every key; nothing is changed yet."""
        read = ConfigReader(cfg)
        self._action = read.choice("action", {name: name for name in ACTIONS}, "register")
        self._name = check_name(read.get("name"))
        self._evaluation_run = read.get("evaluation_run", None)
        self._training_run = read.get("training_run", None)
        self._k = read.integer("k", 1, minimum=1)
        self._max_drop = read.number("max_drop", None, minimum=0, maximum=1)
        self._resamples = read.integer("bootstrap_resamples", 10_000, minimum=1)
        self._seed = read.integer("seed", 0)
        self._alias = read.choice("alias", {"staging": "staging", "production": "production"}, "production")
        self._undo = read.integer("move", None, minimum=1)
        self._card_cfg = read.section("card", optional=True)
        self._by = read.get("by", None) or os.environ.get("MLFLOW_TRACKING_USERNAME") or login_name()
        self._tracking_uri = read.get("tracking_uri", None)
        read.done()

        if self._action in ("register", "production") and self._evaluation_run is None:
            raise ConfigError(f"action={self._action} needs evaluation_run=<id of the evaluation's MLflow run>")
        for key, value in (("evaluation_run", self._evaluation_run), ("training_run", self._training_run)):
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{key} must be an MLflow run id, got {value!r}; put it in quotes: {key}='\"...\"'")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError("promote runs as one process: use --nproc_per_node 1")

    def setup(self) -> None:
        """Opens the store that holds runs and registry."""
        self._client = open_store(self._tracking_uri)
        self._statements = build(self._card_cfg, where="card") or Statements()

    def run(self) -> None:
        """Does what `action` says."""
        getattr(self, self._action)()

    # ------------------------------------------------------------------------------------------------------------------
    # Actions

    def register(self) -> None:
        """Registers a version for the export that was evaluated, with its card, and sets `staging` to it."""
        evaluation = read_evaluation(self._client, self._evaluation_run)
        export = evaluated_export(self._client, evaluation, self._training_run)
        kept = ("wmtp.git_commit", "wmtp.config_sha256", "wmtp.data_sha256", "wmtp.method", "wmtp.dataset")
        tags = {key: export.run.tags[key] for key in kept if key in export.run.tags}
        version = ensure_version(
            self._client, self._name,
            model_sha256=export.sha256, source=export.source, run_id=export.run.run_id,
            evaluation=(evaluation.name, evaluation.run.run_id), tags=tags,
        )  # fmt: skip
        evaluations = [read_evaluation(self._client, run_id) for run_id in version.evaluations.values()]
        card = model_card(self._name, version.number, export, evaluations, self._statements)
        where = publish_card(self._client, export.run.run_id, self._name, version.number, card)
        log(f"{self._name} version {version.number}: {export.source}, card {where}")
        self._report(
            move_alias(
                self._client, self._name, "staging",
                lambda before, record: Choice(version.number, f"registered with {evaluation.name}"),
                action="register", by=self._by, evaluation_run=evaluation.run.run_id,
            ),
            "staging",
        )  # fmt: skip

    def production(self) -> None:
        """Sets `production` to the version that the evaluation is of, unless it is worse than the one there."""
        ours = read_evaluation(self._client, self._evaluation_run)
        version = find_version(self._client, self._name, ours.model_sha256)
        if version is None:
            raise RegistryError(
                f"{self._name} has no version of the model of evaluation run {ours.run.run_id}: register it first "
                f"(action=register evaluation_run={ours.run.run_id})"
            )
        evaluated_export(self._client, ours, version.run_id)  # what the version's run holds today is what was evaluated

        def choose(before: str | None, record: list[Move]) -> Choice | None:
            if before == version.number:
                return None
            if before is None:
                metrics = {name: figure["estimate"] for name, figure in ours.fixed["metrics"].items()}
                first = last_move(record, "production") is None
                why = "first in production" if first else "nothing was in production"
                return Choice(version.number, why, {"evaluation": ours.name, **metrics})
            accepted, why, figures = not_worse(
                ours, self._evaluation_of(before, ours.name),
                k=self._k, max_drop=self._max_drop, seed=self._seed, resamples=self._resamples,
            )  # fmt: skip
            if not accepted:
                raise RegistryError(f"version {version.number} does not replace version {before} in production: {why}")
            return Choice(version.number, why, figures)

        self._report(
            move_alias(
                self._client, self._name, "production", choose,
                action="production", by=self._by, evaluation_run=ours.run.run_id,
            ),
            "production",
        )  # fmt: skip

    def rollback(self) -> None:
        """Sets `alias` back to where it was before its last move, or before the move of that number.

        This is a move too, so two rollbacks together change nothing.
        """
        place = f"{self._name}@{self._alias}"

        def choose(before: str | None, record: list[Move]) -> Choice | None:
            done = done_moves(record, self._alias)
            if not done:
                raise RegistryError(
                    f"{self._name} has no recorded move of {self._alias}: there is nothing to roll back to"
                )
            last = done[-1]
            if last.after != before:
                raise RegistryError(
                    f"{place} points at {shown(before)}, though its last recorded move, {last.number}, set it to "
                    f"{shown(last.after)}: someone moved it outside; set it back to {shown(last.after)} first"
                )
            target = last if self._undo is None else next((move for move in done if move.number == self._undo), None)
            if target is None:
                known = ", ".join(str(move.number) for move in done)
                raise RegistryError(f"{self._name} has no move {self._undo} of {self._alias}; there are {known}")
            if target.before == before:
                raise RegistryError(f"{place} points at {shown(before)} already, as before move {target.number}")
            return Choice(target.before, f"undoes move {target.number}")

        move = move_alias(self._client, self._name, self._alias, choose, action="rollback", by=self._by)
        self._report(move, self._alias)

    def show(self) -> None:
        """Prints the versions and the record of moves, as tables."""
        record = moves(self._client, self._name)
        pointed = {alias: aliased(self._client, self._name, alias) for alias in ("staging", "production")}
        rows = []
        for version in versions(self._client, self._name):
            here = [alias for alias, target in pointed.items() if target == version.number]
            rows.append(
                [
                    version.number, ", ".join(here) or "-", version.tags.get("wmtp.method", "unknown"),
                    ", ".join(version.evaluations), version.tags.get("wmtp.model_sha256", "unknown")[:12],
                    version.run_id or "unknown",
                ]
            )  # fmt: skip
        print_table(["version", "aliases", "method", "evaluations", "model SHA-256", "training run"], rows)
        print()
        rows = [
            [str(m.number), m.time, m.action, f"{m.alias}: {m.before or '-'} -> {m.after or '-'}", m.by, m.state,
             m.decision] for m in record
        ]  # fmt: skip
        print_table(["move", "time (UTC)", "action", "from -> to", "by", "state", "decision"], rows)
        for alias, target in pointed.items():
            last = last_move(record, alias)
            if target != (last.after if last else None):
                log(f"WARNING: {alias} points at version {target}, which no recorded move explains")

    # ------------------------------------------------------------------------------------------------------------------

    def _evaluation_of(self, version: str, name: str) -> Evaluation:
        """Returns the evaluation of that name that the version in production was registered with."""
        known = read_version(self._client, self._name, version).evaluations
        if name not in known:
            raise RegistryError(
                f"{self._name} version {version}, in production, has no evaluation {name!r} to compare with (it has "
                f"{', '.join(known) or 'none'}): evaluate it alike, then action=register evaluation_run=<that run>"
            )
        return read_evaluation(self._client, known[name])

    def _report(self, move: Move | None, alias: str) -> None:
        if move is None:
            log(f"{self._name}@{alias} is there already; nothing changed")
            return
        ends = f"{shown(move.before)} -> {shown(move.after)}"
        log(f"{self._name}@{alias}: {ends} (move {move.number}: {move.decision})")


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip(), flush=True)


@clear_errors()
@config.parse
def main(cfg: DictConfig) -> None:
    recipe = PromoteRecipe(cfg)
    recipe.setup()
    recipe.run()


if __name__ == "__main__":
    main()
