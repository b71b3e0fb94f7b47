"""The cells of a sweep: a recipe, a config and changes of its keys; each checked by its recipe before any runs."""

import copy
import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from omegaconf import DictConfig, OmegaConf

from wmtp.config import ConfigError, changed, load
from wmtp.config.components import check_keys
from wmtp.errors import UserError, one_line

OWN_KEYS = ("seed", "output_dir", "resume", "overwrite", "tracking")  # of a training: the sweep sets them


class SweepError(UserError):
    """A sweep that cannot be run: one line with the cell or key, its value, and the way out."""


@dataclass(frozen=True)
class Cell:
    """What one training run is told, but for its seed and the place of its output.

    Attributes:
        name: of the cell, and of its folder below ``cells/``.
        recipe, config: paths, as `tune run` takes them.
        changes: (dotted) keys of the config and their values, in the order in which they are set.
        axes: those of `changes` in which the cells of a grid differ.
        group: the name that all cells of one grid have in common.
    """

    name: str
    recipe: str
    config: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""

    def arguments(self) -> list[str]:
        """Returns the command line after the recipe."""
        return ["--config", self.config, *map(_argument, self.changes, self.changes.values())]

    def settings(self) -> DictConfig:
        """Returns the config as the recipe would read it.

        Raises:
            ConfigError: a change that cannot be made; its line names the cell.
        """
        try:
            return changed(copy.deepcopy(loaded(self.config)), self.arguments()[2:])
        except ConfigError as error:
            raise SweepError(f"cell {self.name}: {one_line(error)}") from error

    def check(self) -> None:
        """Lets the recipe read every key, and looks each key of a component up in its signature; nothing is built.

        Raises:
            SweepError: a key that the recipe or the component does not have, or a value that the recipe refuses.
        """
        reads, cfg = recipe_class(self.recipe), self.settings()
        try:
            recipe = None if reads is None else reads(cfg)
            # The sections as the recipe holds them: it may have taken keys of its own out.
            held = [cfg] if recipe is None else [value for value in vars(recipe).values() if value is not cfg]
            for section in filter(OmegaConf.is_dict, held):
                check_keys(section, str(section._key() or ""))
        except UserError as error:
            raise SweepError(f"cell {self.name}: {one_line(error)}") from error


def grid(cell: Cell, axes: Mapping[str, Any] | None) -> list[Cell]:
    """Returns a cell for each combination of the axes' values, in their order; the cell itself where there are none.

    Args:
        axes: lists of values by (dotted) key; nested sections are the same as dotted keys.
    """
    values = flat(axes or {})
    for key, options in values.items():
        if not isinstance(options, list) or not options:
            raise SweepError(f"axis {key} must be a list of values, got {options!r}")
    last = [key.rpartition(".")[2] for key in values]
    short = [name if last.count(name) == 1 else key for key, name in zip(values, last, strict=True)]
    # For each axis its values with their part of the name.
    named = [
        [(f"{name}-{slug}", value) for slug, value in zip(_slugs(options), options, strict=True)]
        for name, options in zip(short, values.values(), strict=True)
    ]
    return [
        _with(cell, [part for part, _ in chosen], dict(zip(values, (value for _, value in chosen), strict=True)))
        for chosen in itertools.product(*named)
    ]


def _with(cell: Cell, parts: list[str], axes: dict[str, Any]) -> Cell:
    name = "_".join([cell.name] * bool(cell.name) + parts) or "base"
    return replace(cell, name=name, changes={**cell.changes, **axes}, axes=axes, group=cell.name or name)


def unlike(cells: Iterable[Cell]) -> list[Cell]:
    """Returns the cells, of which no two have one name.

    Raises:
        SweepError: two have, or a name is no folder's.
    """
    found: dict[str, Cell] = {}
    for cell in cells:
        if not re.fullmatch(r"[\w.+=,-]+", cell.name) or cell.name.startswith("."):
            raise SweepError(f"cell {cell.name!r}: a name consists of letters, digits and any of _ . + = , -")
        if cell.name in found:
            raise SweepError(f"two cells have the name {cell.name}; give each a name of its own (cells.name)")
        found[cell.name] = cell
    return list(found.values())


def equalised(cells: Sequence[Cell], base: Cell, cost: Callable[[DictConfig], float], what: str) -> list[Cell]:
    """Returns the cells with `max_steps` such that each costs what the base does: within half a step of it.

    Args:
        cost: of one optimizer step of a config, in any unit.
        what: the unit, for messages.
    """
    base_cfg = base.settings()
    budget = _steps(base, base_cfg, what) * cost(base_cfg)
    equal = []
    for cell in cells:
        cfg = cell.settings()
        _steps(cell, cfg, what)
        steps = max(1, round(budget / cost(cfg)))
        equal.append(cell if steps == cfg.max_steps else replace(cell, changes={**cell.changes, "max_steps": steps}))
    return equal


def tokens_per_step(cfg: DictConfig, processes: int) -> float:
    """Returns how many target tokens a step waits for; where a config sets rows instead, the tokens in them."""
    rows = cfg.batch_size * (cfg.get("gradient_accumulation_steps") or 1) * processes
    return cfg.get("tokens_per_step") or rows * cfg.seq_len


def _steps(cell: Cell, cfg: DictConfig, what: str) -> int:
    if cfg.get("max_steps") is None:
        raise SweepError(f"cell {cell.name} has no max_steps, which equal={what} sets; give it instead of epochs")
    return cfg.max_steps


def refuse_own_keys(cells: Iterable[Cell]) -> None:
    """Raises a SweepError for a change that the sweep itself would undo: of the seed, or of where the output goes."""
    for cell in cells:
        for key in cell.changes:
            if key in OWN_KEYS:
                way_out = "give seeds instead" if key == "seed" else "leave it out"
                raise SweepError(f"cell {cell.name}: {key} is set by the sweep itself; {way_out}")


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested sections by dotted key; a section with a `_component_` is a value."""
    if not isinstance(section, Mapping):
        raise SweepError(f"axes, overrides and search must be keys with their values, got {section!r}")
    found: dict[str, Any] = {}
    for key, value in section.items():
        nested = isinstance(value, Mapping) and value and "_component_" not in value and not _is_range(value)
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def _is_range(value: Mapping[str, Any]) -> bool:
    return {"low", "high"} <= set(value)


loaded = cache(load)


@cache
def recipe_class(path: str) -> Callable[[DictConfig], Any] | None:
    """Returns the class of a recipe's file, whose making reads and checks every key; None if it has none."""
    file = Path(path)
    if not file.is_file():
        raise SweepError(f"recipe {path} does not exist; give its path, such as recipes/lora_wmtp.py")
    spec = importlib.util.spec_from_file_location(f"_sweep_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    own = (value for name, value in vars(module).items() if "Recipe" in name and isinstance(value, type))
    return next((value for value in own if value.__module__ == module.__name__), None)


def _argument(key: str, value: Any) -> str:
    return key if key.startswith("~") else f"{key}={yaml_text(value)}"


def yaml_text(value: Any) -> str:
    """Returns a value as one word of YAML where that can be: as the command line reads it back."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_./][\w./-]*", value):
        read = OmegaConf.from_dotlist([f"value={value}"]).value
        if read == value and isinstance(read, str) and value not in ("None", "~"):
            return value
    return json.dumps(value, ensure_ascii=False)  # YAML does not know JSON's pairs of \\u


def _slugs(options: Sequence[Any]) -> list[str]:
    """Returns each value of an axis as a part of a name; those that look alike in short get a hash of the whole."""
    short, texts = [_slug(value) for value in options], [yaml_text(value) for value in options]
    digests = [hashlib.sha256(text.encode()).hexdigest()[:6] for text in texts]
    return [slug if short.count(slug) == 1 else f"{slug}-{digest}" for slug, digest in zip(short, digests, strict=True)]


def _slug(value: Any) -> str:
    if isinstance(value, int | float):
        return yaml_text(value)  # with its sign
    if isinstance(value, Mapping):
        value = str(value.get("_component_", json.dumps(value))).rpartition(".")[2]
    return re.sub(r"[^\w.+]+", "-", yaml_text(value)).strip("-")[:40]


def suggested(search: Mapping[str, Any], trial: Any) -> dict[str, Any]:
    """Returns a value for each key of a search: what a trial of Optuna's suggests; without one, the first there is.

    Args:
        search: by (dotted) key a list of values, or a range: ``low``, ``high`` and, if wanted, ``log`` or ``step``.
    """
    found: dict[str, Any] = {}
    for key, space in search.items():
        if isinstance(space, list) and space:
            found[key] = space[0] if trial is None else trial.suggest_categorical(key, space)
            continue
        if not isinstance(space, Mapping) or not _is_range(space) or set(space) - {"low", "high", "log", "step"}:
            raise SweepError(f"search.{key} must be a list of values, or low, high and log or step, got {space!r}")
        whole = all(isinstance(space[end], int) for end in ("low", "high"))
        try:
            options = {name: space[name] for name in ("log", "step") if name in space}
            kind = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
            kind(space["low"], space["high"], **options)
            suggest = None if trial is None else trial.suggest_int if whole else trial.suggest_float
            found[key] = suggest(key, space["low"], space["high"], **options) if suggest else space["low"]
        except (TypeError, ValueError) as error:
            raise SweepError(f"search.{key}: {one_line(error)}") from error
    return found
