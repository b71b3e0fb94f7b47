"""A model's versions in the MLflow registry, its aliases `staging` and `production`, and the record of their moves.

    registered model   tags wmtp.move.000007.1f0c...  = {"action": "production", "before": "2", "after": "3", ...}
      version 3        one export: its source, hashes, runs, evaluations and card
    aliases            staging -> 3, production -> 3

The record is append-only. It says who moved which alias and when, between which versions, and on which figures. MLflow
overwrites tags and aliases without a check, so two processes that promote at once could undo each other unnoticed. A
move is therefore recorded first, under a key that only its own process uses. Then all records are read again: if
another process has taken the same number, both withdraw and try again. Of two moves at most one finds itself alone.
(This is mutual exclusion by flags; it only needs reads that see all earlier writes.)

Every function takes an `MlflowClient`; mlflow itself is imported where it is used.
"""

import json
import random
import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

from wmtp.errors import UserError, mask_secrets
from wmtp.tracking.store import check_store, clear_store_errors, existing_client, store_uri, use_store

ALIASES = ("staging", "production")
_RECORD = "wmtp.move."
_EVALUATION = "wmtp.evaluation."
_TRIES = 50


class RegistryError(UserError):
    """A request that the registry cannot fulfil: one line that names the model and the way out."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    number: str  # though a local store gives an integer
    source: str
    run_id: str
    tags: dict[str, str]
    description: str

    @property
    def evaluations(self) -> dict[str, str]:
        """The evaluations that the version was registered with: name to run id."""
        return {k.removeprefix(_EVALUATION): self.tags[k] for k in sorted(self.tags) if k.startswith(_EVALUATION)}


@dataclass(frozen=True)
class Move:
    """One move of an alias, between versions; None is nothing.

    `state` is ``intended`` while the move is under way, then ``done``, or ``abandoned`` if its process ended before the
    alias was moved.
    """

    number: int
    action: str  # register | production | rollback
    alias: str
    before: str | None
    after: str | None
    decision: str
    by: str
    evaluation_run: str | None = None
    figures: dict = field(default_factory=dict)
    time: str = ""  # UTC
    state: str = "intended"
    key: str = ""  # of its tag


@dataclass(frozen=True)
class Choice:
    """The version that an alias is to point at, and the reason."""

    after: str | None
    decision: str
    figures: dict = field(default_factory=dict)


def open_store(tracking_uri: str | None = None):
    """Returns an `MlflowClient` on an existing store; `resolve_checkpoint` then reads names such as ``runs:/ID`` there.

    Args:
        tracking_uri: null is ``$MLFLOW_TRACKING_URI``, else sqlite:///mlflow.db in the working directory.
    """
    use_store(tracking_uri)
    uri = store_uri()
    check_store(uri)
    with store_errors(f"the MLflow store {mask_secrets(uri)} cannot be opened"):
        return existing_client(uri, RegistryError)


def store_errors(what: str) -> AbstractContextManager[None]:
    """Turns MLflow's errors into a RegistryError that begins with ``what``."""
    return clear_store_errors(what, RegistryError)


def check_name(name: str) -> str:
    """Returns a registered model's name unchanged, or refuses one that aliases, tags and paths could not hold."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}", str(name)):
        raise RegistryError(
            f"name {str(name)!r} cannot be a registered model's: use letters, digits, '-', '_' and '.', such as "
            "wmtp-smollm2-135m"
        )
    return str(name)


# ----------------------------------------------------------------------------------------------------------------------
# Versions


def ensure_version(
    client, name: str, *, model_sha256: str, source: str, run_id: str, evaluation: tuple[str, str], tags: dict[str, str]
) -> Version:
    """Returns the version of an export, created unless one has the same model, and adds the evaluation to it.

    Args:
        source, run_id, tags: of a new version: the URI of the export's folder, the training run, further tags.
        evaluation: name and run id; an earlier one of the same name is replaced.
    """
    from mlflow.exceptions import MlflowException

    check_name(name)
    with store_errors(f"model {name} cannot be registered"):
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = find_version(client, name, model_sha256)
        if version is None:
            tags = {"wmtp.model_sha256": model_sha256, "wmtp.training_run_id": run_id, **tags}
            made = str(
                client.create_model_version(name, source=source, run_id=run_id, tags=tags, await_creation_for=0).version
            )
            version = find_version(client, name, model_sha256) or read_version(client, name, made)
            if version.number != made:  # another process registered it at the same moment
                client.delete_model_version(name, made)
        client.set_model_version_tag(name, version.number, f"{_EVALUATION}{evaluation[0]}", evaluation[1])
    return read_version(client, name, version.number)


def find_version(client, name: str, model_sha256: str) -> Version | None:
    """Returns the oldest version whose model has this hash, or None."""
    return next((v for v in versions(client, name) if v.tags.get("wmtp.model_sha256") == model_sha256), None)


def read_version(client, name: str, number: str) -> Version:
    """Returns one version of a model; a RegistryError says that there is none."""
    with store_errors(f"{name} has no version {number}"):
        found = client.get_model_version(name, number)
    return Version(str(found.version), found.source, found.run_id or "", dict(found.tags), found.description or "")


def versions(client, name: str) -> list[Version]:
    """Returns all versions of a model, oldest first; a RegistryError says that there is no such model."""
    _require(client, name)
    numbers: list[str] = []
    token: str | None = ""
    with store_errors(f"the versions of {name} cannot be read"):
        while token is not None:
            page = client.search_model_versions(f"name='{name}'", page_token=token or None)
            numbers, token = numbers + [str(version.version) for version in page], page.token or None
    # Some stores leave tags out of a search, so each version is read by itself.
    return [read_version(client, name, number) for number in sorted(numbers, key=int)]


# ----------------------------------------------------------------------------------------------------------------------
# Moves


def moves(client, name: str) -> list[Move]:
    """Returns all moves of a model's aliases, oldest first; a RegistryError tells of a tag that is no record of one."""
    found = []
    for key, value in _require(client, name).tags.items():
        if key.startswith(_RECORD):
            try:
                found.append(replace(Move(**json.loads(value)), key=key))
            except (TypeError, ValueError) as error:
                raise RegistryError(f"model {name}: tag {key} is no record of a move; someone has edited it") from error
    return sorted(found, key=lambda move: (move.number, move.key))


def aliased(client, name: str, alias: str) -> str | None:
    """Returns the version that an alias points at now."""
    version = _require(client, name).aliases.get(alias)
    return None if version is None else str(version)


def done_moves(record: Sequence[Move], alias: str) -> list[Move]:
    """Returns the completed moves of an alias."""
    return [move for move in record if move.alias == alias and move.state == "done"]


def last_move(record: Sequence[Move], alias: str) -> Move | None:
    """Returns the last completed move of an alias."""
    return next(reversed(done_moves(record, alias)), None)


def move_alias(
    client,
    name: str,
    alias: str,
    choose: Callable[[str | None, list[Move]], Choice | None],
    *,
    action: str,
    by: str,
    evaluation_run: str | None = None,
    patience: float = 30.0,
) -> Move | None:
    """Moves an alias to the version that `choose` returns. Returns the recorded move, None if there was nothing to do.

    Args:
        alias: ``staging`` or ``production``.
        choose: called with the alias's version and all moves, and called again with current ones if another process
            moved an alias meanwhile. None leaves the alias; an exception passes through and nothing is changed.
        action, by, evaluation_run: for the record.
        patience: seconds that another move may be under way before its process counts as dead.

    Raises:
        RegistryError: no such model or version, or other processes kept moving the alias.
    """
    if alias not in ALIASES:
        raise RegistryError(f"alias must be one of {', '.join(ALIASES)}, got {alias!r}")
    for _ in range(_TRIES):
        record = _settled(client, name, patience)
        # Read after the record: a process that moves the alias later leaves a record, which the check below finds.
        before = aliased(client, name, alias)
        choice = choose(before, record)
        if choice is None or choice.after == before:
            return None
        if choice.after is not None:
            read_version(client, name, choice.after)  # an alias that points at nothing cannot be undone
        number = 1 + max((move.number for move in record), default=0)
        move = Move(
            number, action, alias, before, choice.after, choice.decision, by, evaluation_run, choice.figures,
            time=datetime.now(UTC).isoformat(timespec="seconds"), key=f"{_RECORD}{number:06d}.{secrets.token_hex(4)}",
        )  # fmt: skip
        with store_errors(f"the move of {name}@{alias} cannot be recorded"):
            _write(client, name, move)
            if any(other.number >= number and other.key != move.key for other in moves(client, name)):
                client.delete_registered_model_tag(name, move.key)
                time.sleep(random.uniform(0.02, 0.5))
                continue
        return _carry_out(client, name, move)
    raise RegistryError(f"{name}@{alias} was not moved: other processes moved it {_TRIES} times meanwhile; try again")


def _carry_out(client, name: str, move: Move) -> Move:
    """Moves the alias as recorded, checks that it has moved, and marks the record as done."""
    with store_errors(f"{name}@{move.alias} cannot be moved to {shown(move.after)}"):
        if move.after is None:
            client.delete_registered_model_alias(name, move.alias)
        else:
            client.set_registered_model_alias(name, move.alias, move.after)
        if (now := aliased(client, name, move.alias)) != move.after:
            raise RegistryError(
                f"{name}@{move.alias} was set to {shown(move.after)} and points at {shown(now)}: someone moves it "
                "outside of this record"
            )
        if move.after is not None:  # for readers of the version's own page
            said = f"move {move.number}, {move.time}, by {move.by}: {move.decision}"
            client.set_model_version_tag(name, move.after, f"wmtp.{move.alias}", said)
        done = replace(move, state="done")
        _write(client, name, done)
    return done


def _settled(client, name: str, patience: float) -> list[Move]:
    """Returns all moves once none is under way. A dead process's move is closed as done or abandoned."""
    deadline = time.monotonic() + patience
    while True:
        record = moves(client, name)
        under_way = [move for move in record if move.state == "intended"]
        if not under_way:
            return record
        if time.monotonic() > deadline:
            for move in under_way:
                state = "done" if aliased(client, name, move.alias) == move.after else "abandoned"
                with store_errors(f"move {move.number} of {name} cannot be closed"):
                    _write(client, name, replace(move, state=state))
            return moves(client, name)
        time.sleep(random.uniform(0.05, 0.3))


def _write(client, name: str, move: Move) -> None:
    value = {key: value for key, value in asdict(move).items() if key != "key"}
    client.set_registered_model_tag(name, move.key, json.dumps(value, allow_nan=False))


def _require(client, name: str):
    check_name(name)
    with store_errors(f"there is no registered model {name}: register an evaluated export first (action=register)"):
        return client.get_registered_model(name)


def shown(version: str | None) -> str:
    """Returns the version that an alias points at, in words."""
    return "nothing" if version is None else f"version {version}"
