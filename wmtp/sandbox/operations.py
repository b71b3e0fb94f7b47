"""What the judge may ask of a program's objects, by name; done in the confined process."""

import copy
import importlib
import inspect
import itertools
import math
import operator
from collections.abc import Awaitable, Callable, Collection

from wmtp.sandbox.kinds import TYPES

_MAX_ITEMS = 1 << 22  # that a container is asked for at once
UNARY = ("neg", "pos", "abs", "invert")
BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
OPERATORS = UNARY + BINARY
OVERRIDABLE = frozenset({*OPERATORS, "str", "repr", "format", "call"})  # that a subclass may change


def _items(value: Collection) -> list:
    """Returns what the judge takes a container to hold: its length and its items, looked at once."""
    size = len(value)
    return [size, list(itertools.islice(iter(value), min(size, _MAX_ITEMS) + 1))]


def _signature(function: Callable) -> list:
    """Returns parameters as name, kind, and the default where there is one, by keyword."""
    parameters = inspect.signature(function).parameters.values()
    return [[p.name, int(p.kind), {} if p.default is p.empty else {"default": p.default}] for p in parameters]


_loops: list = []


def _run(awaitable: Awaitable) -> object:
    """Drives a coroutine to its end in an event loop that stays, so that what it made goes on working."""
    asyncio = importlib.import_module("asyncio")
    if not _loops:
        _loops.append(asyncio.new_event_loop())
        asyncio.set_event_loop(_loops[0])

    async def wait() -> object:
        return await awaitable

    return _loops[0].run_until_complete(wait())


OPERATIONS: dict[str, Callable] = {
    "call": operator.call,
    "get": lambda value: value,
    "attr": getattr,
    "set_attr": setattr,
    "delete_attr": delattr,
    "item": operator.getitem,
    "set_item": operator.setitem,
    "delete_item": operator.delitem,
    "iter": iter,
    "next": next,
    "items": _items,
    "data": lambda value: value,
    "type": type,
    "has_instance": lambda cls, instance: isinstance(instance, cls),
    "has_subclass": lambda cls, other: issubclass(other, cls),
    "signature": _signature,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "enter": lambda manager: type(manager).__enter__(manager),
    "exit": lambda manager, error: type(manager).__exit__(manager, *_raised(error)),
    "run": _run,
    "anext": lambda iterator: _run(type(iterator).__anext__(iterator)),
    "aiter": lambda iterable: type(iterable).__aiter__(iterable),
    "aenter": lambda manager: _run(type(manager).__aenter__(manager)),
    "aexit": lambda manager, error: _run(type(manager).__aexit__(manager, *_raised(error))),
    **{function.__name__: function for function in (bool, str, repr, format, hash, len, int, float, complex, round)},
    **{name: getattr(math, name) for name in ("trunc", "floor", "ceil")},
    "index": operator.index,
    **{name: getattr(operator, f"__{name}__") for name in OPERATORS},
}


def _raised(name: str | None) -> tuple:
    """Returns what a context manager is told of the exception that ended its block: a builtin one of that name."""
    if name is None:
        return None, None, None
    cls = TYPES.get(name, Exception)
    try:
        raise cls("raised by the test") if cls is not Exception else Exception
    except BaseException as error:
        return type(error), error, error.__traceback__
