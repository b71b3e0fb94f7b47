"""Reading a recipe's config strictly: every value is checked where it is read, and a key nobody read is an error."""

import argparse
import difflib
import functools
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path
from yaml import YAMLError

from wmtp.errors import UserError, mask_secrets, one_line, raised_in


class ConfigError(UserError):
    """A config that cannot be run: one line saying which key, its value, and what is allowed."""


class StopTraining(UserError):
    """Training cannot go on: one line saying at which step, why, and what to look at."""


_REQUIRED = object()
_MOVED_TO = {  # where components were named before, and where they are
    "wmtp.data": ("wmtp.eval", "wmtp.critic", "wmtp.pretrained"),
    "wmtp.lr_schedule": ("wmtp.training.lr_schedule",),
    "wmtp.model_card": ("wmtp.registry.card",),
    "wmtp.rewards": ("wmtp.critic.rewards",),
}


class ConfigReader:
    """Typed access to a config's keys. Call :meth:`done` when all are read: what nobody read is a misspelt key.

    A recipe that reads a new key allows it; there is no schema to keep beside the code. Texts that begin with ``~/``
    are paths in the home folder, everywhere in the config. A number in quotes is that number.
    """

    def __init__(self, cfg: DictConfig) -> None:
        try:
            OmegaConf.resolve(cfg)
        except OmegaConfBaseException as error:
            raise ConfigError(f"the config has a reference that leads nowhere: {one_line(error)}") from error
        _expand_home(cfg)
        self._cfg = cfg
        self._read: set[str] = set()

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a (dotted) key; `default` where it is absent or null, an error if there is none."""
        self._read.add(key.split(".")[0])
        value = OmegaConf.select(self._cfg, key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"config key {key!r} is missing; add it (configs/ has commented examples)")
        return default

    def number(
        self, key: str, default: Any = _REQUIRED, *, above: float = -math.inf, minimum: float = -math.inf,
        maximum: float = math.inf,
    ) -> float | None:  # fmt: skip
        """A finite real number in the given range; None only if that is the default."""
        value = as_number(self.get(key, default))
        if value is None:
            return None
        bounds = [f"> {above}"] * (above > -math.inf) + [f">= {minimum}"] * (minimum > -math.inf)
        bounds += [f"<= {maximum}"] * (maximum < math.inf)
        allowed = f"a number {' and '.join(bounds)}".strip()
        real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not real or not above < value or not minimum <= value <= maximum:
            raise ConfigError(f"{key} must be {allowed}, got {value!r}")
        return float(value)

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 0) -> int | None:
        """A whole number >= minimum; None only if that is the default."""
        value = _whole(as_number(self.get(key, default)))
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(f"{key} must be a whole number >= {minimum}, got {value!r}")
        return value

    def numbers(
        self,
        key: str,
        default: Any = _REQUIRED,
        *,
        minimum: float = -math.inf,
        whole: bool = False,
        distinct: bool = True,
    ) -> list[float] | None:
        """A list of one or more finite numbers >= minimum, different or whole ones if asked; None only by default."""
        values = self.get(key, default)
        if values is None:
            return None
        if isinstance(values, Sequence) and not isinstance(values, str):
            values = [_whole(as_number(v)) if whole else as_number(v) for v in values]
        kinds = int if whole else int | float
        good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0 and all(
            isinstance(v, kinds) and not isinstance(v, bool) and math.isfinite(v) and v >= minimum for v in values
        )  # fmt: skip
        if not good or (distinct and len(set(values)) < len(values)):
            kind = f"{'different ' * distinct}{'whole ' * whole}numbers{f' >= {minimum}' * (minimum > -math.inf)}"
            raise ConfigError(f"{key} must be {kind}, in a list, got {values!r}")
        return list(values) if whole else [float(v) for v in values]

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{key} must be true or false, got {value!r}")
        return value

    def choice(self, key: str, options: dict[Any, Any], default: Any = _REQUIRED) -> Any:
        """The option the value names; null is the default, or None where that is an option."""
        value = self.get(key, default)
        if None in options.values() and key in self._cfg and self._cfg[key] is None:
            return None
        for name, option in options.items():
            if name == value:
                return option
        raise ConfigError(f"{key} must be one of {', '.join(map(str, options))}, got {value!r}")

    def section(self, key: str, *, optional: bool = False) -> DictConfig | None:
        """A nested part of the config, to be given to :func:`build`."""
        value = self.get(key, None if optional else _REQUIRED)
        if value is not None and not OmegaConf.is_dict(value):
            raise ConfigError(f"{key} must be a section with a _component_, got {value!r}")
        return value

    def done(self) -> None:
        """Refuse keys that nobody read."""
        unread = [str(key) for key in self._cfg if key not in self._read]
        if unread:
            raise ConfigError("; ".join(_unknown(key, self._read, "config") for key in unread))


def build(section: DictConfig | None, *args: Any, where: str, **kwargs: Any) -> Any:
    """Call a section's `_component_` with its keys, after checking them by name; no section gives None.

    A function of ``signals`` is a weighting itself: it is not called, its other keys are fixed (functools.partial).
    Sections with a `_component_` among its keys, at any depth of plain sections, are built first, with the same checks,
    as ``where.key``.

    Args:
        section: config with a `_component_` dot path; its other keys are keyword arguments.
        where: the section's name, for messages.
        *args, **kwargs: what the recipe itself passes.

    Raises:
        ConfigError: component not found, key unknown or missing, or a value that WMTP or a library refused. What is
            raised in code of the user's own, which is neither, is theirs and comes as it is.
    """
    if section is None:
        return None
    component, path = component_of(section, where), section._component_
    parameters = _parameters(component)
    by_name = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    allowed = by_name - set(kwargs) - set(list(parameters)[: len(args)])
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in section:
        if key != "_component_" and key not in allowed and not takes_any:
            raise ConfigError(_unknown(str(key), allowed, where))
    if "signals" in allowed and "signals" not in section:
        component, allowed = functools.partial(functools.partial, component), allowed - {"signals"}
    missing = [n for n in allowed if parameters[n].default is inspect.Parameter.empty and n not in section]
    if missing:
        raise ConfigError(f"{where} ({path}) lacks the key(s) {', '.join(sorted(missing))}")
    values = {str(key): _built(value, f"{where}.{key!s}") for key, value in section.items() if key != "_component_"}
    for n in [n for n in values if n in by_name]:
        _refuse_text_as_list(values[n], parameters[n], f"{where}.{n}")
        values[n] = _numeric(values[n], parameters[n], f"{where}.{n}")
    try:
        return component(*args, **{**values, **kwargs})
    except UserError as error:
        # What a component says about one of its own keys gets the key's full name: weighting.method.percentile.
        if str(error).split(" ", 1)[0] in section:
            raise ConfigError(f"{where}.{one_line(error)}") from error
        raise
    except (TypeError, ValueError) as error:
        if raised_in(error) != __file__:
            raise
        raise ConfigError(f"{where} ({path}): {one_line(error)}") from error


def component_of(section: DictConfig, where: str) -> Callable[..., Any]:
    """The class or function that a section's `_component_` names.

    Raises:
        ConfigError: none is named, or it cannot be found. An error of the module itself, which is the user's own, comes
            as it is.
    """
    path = section.get("_component_")
    if path is None:
        raise ConfigError(f"{where} has no _component_: name the class or function to build, as a dot path")
    if not isinstance(path, str):
        raise ConfigError(f"{where}._component_ must be the dot path of a class or function, got {path!r}")
    if os.getcwd() not in sys.path:  # a user's own module, beside where the recipe is started
        sys.path.append(os.getcwd())
    try:
        component = _get_component_from_path(path)
    except (InstantiationError, ImportError, ValueError) as error:
        cause = error.__cause__ or error
        absent = isinstance(cause, ModuleNotFoundError) and f"{path}.".startswith(f"{cause.name}.")
        if absent or (raised_in(cause) in (__file__, "") and not isinstance(cause, SyntaxError | ModuleNotFoundError)):
            why = _moved(path) or one_line(error)
            raise ConfigError(f"{where}._component_ {path!r} cannot be found: {why}") from error
        raise cause from None
    try:
        _parameters(component)
    except (TypeError, ValueError):
        kind = type(component).__name__
        raise ConfigError(f"{where}._component_ {path!r} is a {kind}, not a class or function with keys") from None
    return component


def _moved(path: str) -> str | None:
    """Where a component of WMTP is that an older config names elsewhere; None for all others."""
    folder, _, name = path.rpartition(".")
    for room in _MOVED_TO.get(folder, ()):
        if hasattr(importlib.import_module(room), name):
            return f"it is {room}.{name} now"
    return None


def as_number(value: Any) -> Any:
    """The number that a text is, such as '1e-5' in quotes; anything else as it is."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        with suppress(ValueError):
            number = kind(value)
            return number if math.isfinite(number) else value
    return value


def _whole(value: Any) -> Any:
    """1e5 is the whole number that it is, though YAML reads a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _parameters(component: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(component, eval_str=True).parameters
    except (NameError, AttributeError, TypeError, SyntaxError):  # an annotation that is only there for a type checker
        return inspect.signature(component).parameters


def _numeric(value: Any, parameter: inspect.Parameter, where: str) -> Any:
    """A value as a number where its parameter takes nothing else, by its annotation or default; also inside lists."""
    kinds = _kinds(parameter.annotation if parameter.annotation is not parameter.empty else type(parameter.default))
    if not kinds & {"int", "float"} or not kinds <= {"int", "float", "bool", "NoneType", "Tensor", "ellipsis"}:
        return value
    if isinstance(value, list):
        return [_numeric(child, parameter, f"{where}.{i}") for i, child in enumerate(value)]
    number = as_number(value)
    number = number if "float" in kinds else _whole(number)
    if isinstance(number, str) or (isinstance(number, bool) and "bool" not in kinds):
        raise ConfigError(f"{where} must be a number, got {value!r}")
    if isinstance(number, float) and "float" not in kinds:
        raise ConfigError(f"{where} must be a whole number, got {value!r}")
    return number


def _refuse_text_as_list(value: Any, parameter: inspect.Parameter, where: str) -> None:
    """A text is a sequence of letters to Python, but no list of names to whoever writes a config; nor is a list one."""
    annotation = parameter.annotation
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = {get_origin(option) or option for option in options}
    if isinstance(value, str) and str not in kinds and kinds & {Sequence, Collection, list, tuple}:
        raise ConfigError(f"{where} must be a list, got {value!r}; write [{value}]")
    if isinstance(value, list | dict) and str in kinds and kinds <= {str, type(None)}:
        raise ConfigError(f"{where} must be a text, got {value!r}")


def _kinds(annotation: Any) -> set[str]:
    """Names of the types that an annotation is made of: int, float and NoneType of ``list[int | float] | None``."""
    parts = annotation if isinstance(annotation, list) else get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {getattr(annotation, "__name__", type(annotation).__name__)}


def _expand_home(node: Any) -> None:
    for key in list(node) if OmegaConf.is_dict(node) else range(len(node)):
        child = None if OmegaConf.is_missing(node, key) else node[key]
        if OmegaConf.is_config(child):
            _expand_home(child)
        elif isinstance(child, str) and child.startswith("~"):
            node[key] = os.path.expanduser(child)


def _built(value: Any, where: str) -> Any:
    """A config value as plain Python, with what its sections name built."""
    if not OmegaConf.is_dict(value):
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if "_component_" in value:
        return build(value, where=where)
    return {key: _built(child, f"{where}.{key}") for key, child in value.items()}


def parse(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """Decorates a recipe's `main`: it is called with the config of :func:`read_command_line`."""

    @functools.wraps(main)
    def wrapper() -> None:
        main(read_command_line(sys.argv[1:], about=sys.modules[main.__module__].__doc__))

    return wrapper


def read_command_line(arguments: Sequence[str], about: str | None = None) -> DictConfig:
    """The config of ``--config file.yaml``, with the command line's changes, in their order.

    ``key=value`` sets a (dotted) key to a YAML value, which may hold further ``=``; where the key is a section, a text
    is its new `_component_`. ``~key`` removes a key.

    Args:
        about: what ``--help`` shows.

    Raises:
        ConfigError: the file is no config, or an argument is no change of one.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="YAML file; change its keys with key=value, or ~key to remove")
    known, changes = parser.parse_known_args(arguments)
    file = Path(known.config).expanduser()
    try:
        cfg = OmegaConf.load(file)
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(f"--config {file} cannot be read: {one_line(error)}") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"--config {file} holds a list; a config is keys and values")
    for change in changes:
        try:
            _change(cfg, change)
        except (OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"{change!r} on the command line: {one_line(error)}") from error
    return cfg


def _change(cfg: DictConfig, change: str) -> None:
    key, equals, text = change.partition("=")
    if change.startswith("~"):
        parent, _, name = key[1:].rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if not OmegaConf.is_dict(node) or name not in node:
            raise ConfigError("the config has no such key to remove")
        del node[name]
        return
    if not equals or not key or key.startswith("-"):
        raise ConfigError("write key=value, such as max_steps=20, or ~key to remove a key")
    try:
        read = OmegaConf.from_dotlist([f"value={'null' if text == 'None' else text}"])
        value = dict(OmegaConf.to_container(read))["value"]  # type: ignore[arg-type]
    except YAMLError as error:
        raise ConfigError(f"the value is no YAML, quote it: \"{key}='{text}'\" ({one_line(error)})") from error
    if value is None and text.lower() not in ("null", "none", "~"):
        raise ConfigError(f"the value is empty; write {key}=null if nothing is meant")
    node = OmegaConf.select(cfg, key)
    if isinstance(value, str) and OmegaConf.is_dict(node) and "_component_" in node:
        key += "._component_"
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)


def config_changes(before: Mapping | None, now: DictConfig) -> str:
    """What a run that goes on does otherwise: `` with max_steps 20 -> 40, optimizer.lr 0.003 -> 0.001``, or ''.

    Args:
        before: the config of its checkpoint, None where it holds none.
        now: the config; its keys resume and overwrite say nothing about the run.
    """
    if before is None:
        return ""
    after = dict(OmegaConf.to_container(now, resolve=True))  # type: ignore[arg-type]
    found = [line for line in differences(before, after) if line.split(" ", 1)[0] not in ("resume", "overwrite")]
    return f" with {', '.join(found)}" if found else ""


def differences(before: Mapping, after: Mapping, prefix: str = "") -> list[str]:
    """Each (dotted) key whose value differs, with both values, short and without secrets; an absent one is null."""
    found = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} {_short(old)} -> {_short(new)}")
    return found


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "_component_" in value:
        value = value["_component_"]
    return mask_secrets("null" if value is None else str(value))[:100]


def _unknown(key: str, known: set[str], where: str) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return f"unknown key {key!r} in {where}; {hint}"
