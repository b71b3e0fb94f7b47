"""Values of the standard library's and numpy's classes as data, and the tables of what may be named at all.

Nothing is imported because an answer names it: a class comes out of `TYPES`, and numpy is the one module that is
imported when the first array comes.
"""

import array
import builtins
import datetime
import decimal
import fractions
import functools
import importlib
import keyword
import pathlib
import re
import sys
import types
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable

_DTYPE = re.compile(r"[<>|=]?([biufcSU]\d+|[mM]8\[\d*\w+\]|\?)")
_KEPT_CHARACTERS = 1000  # of the names of a class that is kept for the programs to come
_MEMORY_FORMATS = "Bbc"
_PATHS = (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath)

# Classes that an answer may name. All are ours, and none runs code it is given.
TYPES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *(int, float, complex, bool, str, bytes, bytearray, memoryview, list, tuple, dict, set, frozenset, range),
        *(slice, object, type, type(None), type(...), type(NotImplemented), types.FunctionType, types.GeneratorType),
        *(Counter, OrderedDict, defaultdict, deque, decimal.Decimal, fractions.Fraction, array.array, uuid.UUID),
        *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone, zoneinfo.ZoneInfo),
        *(*_PATHS, re.Pattern, re.Match),
    )
} | {name: cls for name, cls in vars(builtins).items() if isinstance(cls, type) and issubclass(cls, BaseException)}
_NAMES = {cls: cls.__name__ for cls in TYPES.values()}
_CONSTANTS = {"Ellipsis": ..., "NotImplemented": NotImplemented}


def encode(
    value: object, cls: type, encode_item: Callable[[object], object], grow: Callable[[int], None]
) -> dict | None:
    """Returns `value`, of class `cls`, as tagged data, or None where it is no library value."""
    if cls is type or issubclass(cls, type):
        name = _NAMES.get(value) if cls is type else None
        return None if name is None else {"L": ["type", name]}
    module = cls.__module__ if type(cls) is type else None
    if module == "numpy":
        return _encode_numpy(value, encode_item, grow)
    content = _ENCODERS[cls](value) if cls in _ENCODERS else None
    return None if content is None else {"L": [content[0], *map(encode_item, content[1:])]}


def decode(content: list, decode_item: Callable[[object], object]) -> object:
    """Returns the value that `encode` was given; raises one of `codec.MALFORMED`."""
    kind, *parts = content
    if kind == "numpy":
        return _decode_numpy(parts, decode_item)
    return _BUILDERS[kind](*map(decode_item, parts))


def _memory(view: memoryview) -> tuple | None:
    plain = view.contiguous and view.ndim == 1 and view.format in _MEMORY_FORMATS
    return ("memoryview", view.tobytes(), view.format) if plain else None


_ENCODERS: dict[type, Callable[..., tuple | None]] = {
    type(...): lambda _: ("constant", "Ellipsis"),
    type(NotImplemented): lambda _: ("constant", "NotImplemented"),
    slice: lambda value: ("slice", value.start, value.stop, value.step),
    memoryview: _memory,
    array.array: lambda value: ("array", value.typecode, value.tobytes()),
    uuid.UUID: lambda value: ("uuid", value.int),
    datetime.timezone: lambda zone: ("timezone", *zone.__getinitargs__()),
    zoneinfo.ZoneInfo: lambda value: None if value.key is None else ("zone", value.key),
    type({}.keys()): lambda view: ("keys", dict(view.mapping)),
    type({}.values()): lambda view: ("values", dict(view.mapping)),
    type({}.items()): lambda view: ("items", dict(view.mapping)),
    **dict.fromkeys(_PATHS, lambda value: ("path", type(value).__name__, str(value))),
}
_BUILDERS: dict[str, Callable[..., object]] = {
    "type": lambda name: TYPES[name],
    "constant": lambda name: _CONSTANTS[name],
    "slice": slice,
    "memoryview": lambda data, form: memoryview(data).cast(form),
    "array": lambda typecode, data: array.array(typecode, _checked(bytes, data)),
    "uuid": lambda number: uuid.UUID(int=number),
    "timezone": datetime.timezone,
    "zone": lambda key: zoneinfo.ZoneInfo(_checked(str, key)),
    "keys": lambda values: _checked(dict, values).keys(),
    "values": lambda values: _checked(dict, values).values(),
    "items": lambda values: _checked(dict, values).items(),
    "path": lambda name, text: getattr(pathlib, name if "Path" in name and name in TYPES else "")(_checked(str, text)),
}


def _checked(cls: type, value: object) -> object:
    if type(value) is not cls:
        raise TypeError(f"expected {cls.__name__}, got {type(value).__name__}")
    return value


def _encode_numpy(value: object, encode_item: Callable[[object], object], grow: Callable[[int], None]) -> dict | None:
    """Returns an array or a scalar as type, shape (None for a scalar) and bytes, or items where they are objects."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if type(value) is numpy.ndarray:
        shape = list(value.shape)
    elif issubclass(type(value), numpy.generic):
        shape = None
    else:
        return None
    if value.dtype == object:
        return {"L": ["numpy", "O", shape, encode_item(value.ravel().tolist())]}
    if not _DTYPE.fullmatch(value.dtype.str):
        return None
    grow(2 * value.nbytes)
    return {"L": ["numpy", value.dtype.str, shape, value.tobytes().hex()]}


def _decode_numpy(parts: list, decode_item: Callable[[object], object]) -> object:
    """Returns the array; its shape must fit the data that came before anything of that size is made."""
    numpy = importlib.import_module("numpy")
    name, shape, content = parts
    sizes = [] if shape is None else shape
    if type(sizes) is not list or not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes):
        raise ValueError("a shape is a list of sizes")
    if name == "O":
        items = decode_item(content)
        if type(items) is not list:
            raise TypeError("an array of objects is made from a list")
        flat = numpy.empty(len(items), dtype=object)
        for index, item in enumerate(items):
            flat[index] = item
    elif _DTYPE.fullmatch(name):
        flat = numpy.frombuffer(bytes.fromhex(content), dtype=name).copy()
    else:
        raise ValueError("no type of numpy's plain ones")
    return flat.reshape(sizes) if shape is not None else flat.reshape(())[()]


def record_type(type_name: str, names: tuple[str, ...]) -> type:
    """Returns a class like a named tuple's, without code of the program's; the same one for the same small names."""
    make = _record_type if sum(map(len, names)) <= _KEPT_CHARACTERS else _record_type.__wrapped__
    return make(type_name[:_KEPT_CHARACTERS], names)


@functools.lru_cache(maxsize=1024)
def _record_type(type_name: str, names: tuple[str, ...]) -> type:
    def replace(self: tuple, /, **changes: object) -> tuple:
        fields = dict(zip(names, self, strict=True))
        if changes.keys() - fields.keys():
            raise ValueError(f"Got unexpected field names: {sorted(changes.keys() - fields.keys())!r}")
        return tuple.__new__(type(self), (fields | changes).values())

    members: dict[str, object] = {
        "__slots__": (),
        "_fields": names,
        "_asdict": lambda self: dict(zip(names, self, strict=True)),
        "_replace": replace,
        "_make": classmethod(tuple.__new__),
        "__repr__": lambda self: f"{type_name}({', '.join(f'{n}={v!r}' for n, v in zip(names, self, strict=True))})",
    }
    for index, name in enumerate(names):
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            continue  # reachable by index only
        members[name] = property(lambda self, index=index: tuple.__getitem__(self, index))
    return type(type_name if type_name.isidentifier() else "Record", (tuple,), members)
