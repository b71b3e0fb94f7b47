"""Building of the components that a config's sections name, with their keys checked by name."""

import difflib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from wmtp.config.reader import ConfigError, as_number, unknown_key, whole_number
from wmtp.errors import UserError, one_line, raised_in


def build(section: DictConfig | None, *args: Any, where: str, **kwargs: Any) -> Any:
    """Calls a section's `_component_` with its keys, after checking them by name. No section gives None.

    A function of ``signals`` is a weighting itself: it is not called, its other keys are fixed (functools.partial).
    Sections below this one that have a `_component_` are built first, with the same checks, as ``where.key``; of a
    builder of data, a function of ``tokenizer``, the keys are fixed, and this section's component calls it.

    Args:
        section: config with a `_component_` dot path; its other keys are keyword arguments.
        where: the section's name, for messages.
        *args, **kwargs: arguments of the recipe's own.

    Raises:
        ConfigError: component not found, key unknown or missing, or a value that WMTP or a library refused. Errors
            raised in the user's own code pass unchanged.
    """
    if section is None:
        return None
    component, values = checked(section, *args, where=where, **kwargs)
    try:
        return component(*args, **{**values, **kwargs})
    except UserError as error:
        # A message about one of the component's own keys gets the key's full name: weighting.method.percentile.
        if str(error).split(" ", 1)[0] in section:
            raise ConfigError(f"{where}.{one_line(error)}") from error
        raise
    except (TypeError, ValueError) as error:
        if raised_in(error) != __file__:
            raise
        raise ConfigError(f"{where} ({section._component_}): {one_line(error)}") from error


def checked(section: DictConfig, *args: Any, where: str, **kwargs: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns what :func:`build` calls for a section, and the arguments that the section gives, without the call.

    Args:
        section, where, *args, **kwargs: as in :func:`build`.

    Raises:
        ConfigError: component not found, key unknown or missing, or a value of a wrong type.
    """
    component, path = component_of(section, where), section._component_
    parameters = _parameters(component)
    by_name = _names(parameters)
    allowed = by_name - set(kwargs) - set(list(parameters)[: len(args)])
    _refuse_unknown(section, parameters, allowed, where)
    if "signals" in allowed and "signals" not in section:
        component, allowed = functools.partial(functools.partial, component), allowed - {"signals"}
    missing = [n for n in allowed if parameters[n].default is inspect.Parameter.empty and n not in section]
    if missing:
        raise ConfigError(f"{where} ({path}) lacks the key(s) {', '.join(sorted(missing))}")
    values = {str(key): _built(value, f"{where}.{key!s}") for key, value in section.items() if key != "_component_"}
    for n in [n for n in values if n in by_name]:
        _refuse_no_list(values[n], parameters[n], f"{where}.{n}")
        values[n] = _scalar(values[n], parameters[n], f"{where}.{n}")
    return component, values


def check_keys(node: Any, where: str = "") -> None:
    """Looks every key of a config's components up in their signatures, at any depth; builds nothing.

    Raises:
        ConfigError: a component that cannot be found, or a key that it does not take.
    """
    if OmegaConf.is_dict(node) and "_component_" in node:
        parameters = _parameters(component_of(node, where))
        _refuse_unknown(node, parameters, _names(parameters), where)
    if OmegaConf.is_config(node):
        for key in node if OmegaConf.is_dict(node) else range(len(node)):
            check_keys(node[key], f"{where}.{key}" if where else str(key))


def _names(parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    return {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _refuse_unknown(
    section: DictConfig, parameters: Mapping[str, inspect.Parameter], allowed: set[str], where: str
) -> None:
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in section:
        if key != "_component_" and key not in allowed and not takes_any:
            raise ConfigError(unknown_key(str(key), allowed, where))


def component_of(section: DictConfig, where: str) -> Callable[..., Any]:
    """Returns the class or function that a section's `_component_` names.

    Raises:
        ConfigError: none is named, or it cannot be found. An error inside the module passes unchanged.
    """
    path = section.get("_component_")
    if path is None:
        raise ConfigError(f"{where} has no _component_: name the class or function to build, as a dot path")
    if not isinstance(path, str):
        raise ConfigError(f"{where}._component_ must be the dot path of a class or function, got {path!r}")
    if os.getcwd() not in sys.path:  # for the user's own modules in the working directory
        sys.path.append(os.getcwd())
    try:
        component = _get_component_from_path(path)
    except (InstantiationError, ImportError, ValueError) as error:
        cause = error.__cause__ or error
        absent = isinstance(cause, ModuleNotFoundError) and f"{path}.".startswith(f"{cause.name}.")
        if absent or (raised_in(cause) in (__file__, "") and not isinstance(cause, SyntaxError | ModuleNotFoundError)):
            why = _meant(path) or one_line(error)
            raise ConfigError(f"{where}._component_ {path!r} cannot be found: {why}") from error
        raise cause from None
    try:
        _parameters(component)
    except (TypeError, ValueError):
        kind = type(component).__name__
        raise ConfigError(f"{where}._component_ {path!r} is a {kind}, not a class or function with keys") from None
    return component


def _meant(path: str) -> str | None:
    """Returns the component that a path is nearest to, by the first name in it that nothing has; None if none is."""
    names = path.split(".")
    known = max((n for n in range(1, len(names)) if ".".join(names[:n]) in sys.modules), default=0)
    there = vars(sys.modules.get(".".join(names[:known]), object))
    public = {name for name in there if not name.startswith("_")} | getattr(there.get("__getattr__"), "names", set())
    near = difflib.get_close_matches(names[known], sorted(public), n=1)
    return f"did you mean {'.'.join([*names[:known], *near, *names[known + 1 :]])}?" if near else None


def _parameters(component: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(component, eval_str=True).parameters
    except (NameError, AttributeError, TypeError, SyntaxError):  # an annotation that only a type checker can resolve
        return inspect.signature(component).parameters


_SCALARS = {"int", "float", "bool", "NoneType", "Tensor", "ellipsis"}


def _scalar(value: Any, parameter: inspect.Parameter, where: str) -> Any:
    """Returns a value of a parameter that takes only numbers, or only true and false; also inside lists.

    What the parameter takes is said by its annotation, or by its default. A number in quotes is that number.
    """
    annotation = type(parameter.default) if parameter.annotation is parameter.empty else parameter.annotation
    kinds = _kinds(annotation)
    if not kinds & {"int", "float", "bool"} or not kinds <= _SCALARS:
        return value
    has_lists = not {getattr(option, "__name__", "") for option in _options(annotation)} <= _SCALARS
    if isinstance(value, list) and has_lists:
        return [_scalar(child, parameter, f"{where}.{i}") for i, child in enumerate(value)]
    nullable = "NoneType" in kinds or parameter.default is None
    if value is None and nullable:
        return value
    number = as_number(value) if kinds & {"int", "float"} else value
    number = number if "float" in kinds else whole_number(number)
    kind = "a number" if kinds & {"int", "float"} else "true or false"
    fits = "bool" in kinds if isinstance(number, bool) else kind == "a number" and isinstance(number, int | float)
    if not fits or number != number:  # NaN is what a failed calculation leaves, and compares with no bound
        got = "null" if value is None else repr(value)
        raise ConfigError(f"{where} must be {kind}{' or null' * nullable}, got {got}")
    if isinstance(number, float) and "float" not in kinds:
        raise ConfigError(f"{where} must be a whole number{' or null' * nullable}, got {value!r}")
    return number


def _refuse_no_list(value: Any, parameter: inspect.Parameter, where: str) -> None:
    """Refuses what is no list for a list parameter (Python would iterate over a text's letters), and the reverse."""
    options = _options(parameter.annotation)
    kinds = {get_origin(option) or option for option in options}
    lists = kinds & {Sequence, Collection, list, tuple}
    refused = (str,) * (str not in kinds) + (bool, int, float) * (lists == kinds)
    if lists and isinstance(value, refused):
        raise ConfigError(f"{where} must be a list, got {value!r}; write [{value}]")
    for option in options if isinstance(value, list) and kinds == {tuple} else ():
        length = len(get_args(option))
        if ... not in get_args(option) and length not in (0, len(value)):
            raise ConfigError(f"{where} must be a list of {length}, got {value!r}")
    if isinstance(value, list | dict) and str in kinds and kinds <= {str, type(None)}:
        raise ConfigError(f"{where} must be a text, got {value!r}")


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _kinds(annotation: Any) -> set[str]:
    """Returns the names of the types in an annotation: int, float and NoneType of ``list[int | float] | None``."""
    parts = annotation if isinstance(annotation, list) else get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {getattr(annotation, "__name__", type(annotation).__name__)}


def _built(value: Any, where: str) -> Any:
    """Returns a config value as plain Python, with the components of its sections built."""
    if not OmegaConf.is_dict(value):
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if "_component_" in value:
        if next(iter(_parameters(component_of(value, where))), None) == "tokenizer":  # data, built by what takes them
            component, values = checked(value, None, where=where)
            return functools.partial(component, **values)
        return build(value, where=where)
    return {key: _built(child, f"{where}.{key}") for key, child in value.items()}
