"""The kinds of values that are data: how each is taken apart and put together, and the classes that may be named.

Nothing is imported because an answer names it: a class comes out of `TYPES`, and numpy is the one module that is
imported when the first array comes.
"""

import array
import builtins
import datetime
import functools
import importlib
import pathlib
import re
import sys
import types
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from operator import attrgetter
from typing import Any, NamedTuple

from wmtp.sandbox.set_order import ordered_set

_MAX_FRACTION_BITS = 1 << 17  # of a part: their gcd takes quadratic time
_DTYPE = re.compile(r"[<>|=]?([biufcSU]\d+|[mM]8\[\d*\w+\]|\?)")
_KEPT_CHARACTERS = 1000  # of the names of a class that is kept for the programs to come
_MEMORY_FORMATS = "Bbc"
_PATHS = (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath)

# Classes that an answer may name. All are ours, and none runs code it is given.
TYPES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        *(int, float, complex, bool, str, bytes, bytearray, memoryview, list, tuple, dict, set, frozenset, range),
        *(slice, object, type, type(None), type(...), type(NotImplemented), types.FunctionType, types.GeneratorType),
        *(Counter, OrderedDict, defaultdict, deque, Decimal, Fraction, array.array, uuid.UUID),
        *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone, zoneinfo.ZoneInfo),
        *(*_PATHS, re.Pattern, re.Match),
    )
} | {name: cls for name, cls in vars(builtins).items() if isinstance(cls, type) and issubclass(cls, BaseException)}
_NAMES = {cls: cls.__name__ for cls in TYPES.values()}


class Kind(NamedTuple):
    """A class of values, what they are taken apart into (None: this one is no data), and what makes one of the parts.

    The parts of a subclass's instance are read by the methods of `cls`, whatever the subclass has in their place. What
    `make` gets may be a forger's; it raises one of `codec.MALFORMED` where that does not fit.
    """

    cls: type
    parts: Callable[[Any], tuple | None]
    make: Callable[..., object]


def _of(make: Callable, *classes: type | tuple) -> Callable[..., object]:
    """Returns `make` for parts of exactly those classes, `object` being any."""

    def checked(*parts: object) -> object:
        for part, allowed in zip(parts, classes, strict=True):
            if allowed is not object and type(part) not in (allowed if type(allowed) is tuple else (allowed,)):
                raise TypeError(f"a {type(part).__name__} was not expected")
        return make(*parts)

    return checked


def _dict(pairs: tuple) -> dict:
    if not all(type(pair) is list for pair in pairs):
        raise TypeError("an item of a dict is a list of two")
    return dict(pairs)


def _set(cls: Any) -> Kind:
    """Sends the size of the table, and the items in the order of the table."""
    return Kind(
        cls,
        lambda value: (cls.__sizeof__(value), [*cls.__iter__(value)]),
        _of(lambda size, items: ordered_set(cls, items, size), int, list),
    )


def _time(cls: type[datetime.datetime] | type[datetime.time]) -> Kind:
    """Keeps local time and zone apart: a zone has more to it than today's offset."""

    def make(text: str, zone: Any, fold: int) -> object:
        return cls.fromisoformat(text).replace(tzinfo=zone, fold=fold)

    def parts(value: Any) -> tuple:
        return cls.isoformat(cls.replace(value, tzinfo=None)), value.tzinfo, value.fold

    return Kind(cls, parts, _of(make, str, object, int))


def _fraction(value: Fraction) -> tuple | None:
    parts = int(value.numerator), int(value.denominator)
    return None if max(part.bit_length() for part in parts) > _MAX_FRACTION_BITS else parts


def _make_fraction(numerator: int, denominator: int) -> Fraction:
    if denominator < 1 or max(numerator.bit_length(), denominator.bit_length()) > _MAX_FRACTION_BITS:
        raise ValueError("no fraction of a length that is sent")
    return Fraction(numerator, denominator)


def _memory(view: memoryview) -> tuple | None:
    plain = view.contiguous and view.ndim == 1 and view.format in _MEMORY_FORMATS
    return (view.tobytes(), view.format) if plain else None


def _numpy(value: Any) -> tuple | None:
    """Returns type, shape (None for a scalar) and bytes of an array or a scalar, or items where they are objects."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not (type(value) is numpy.ndarray or issubclass(type(value), numpy.generic)):
        return None
    shape = list(value.shape) if type(value) is numpy.ndarray else None
    if value.dtype == object:
        return "O", shape, value.ravel().tolist()
    return (value.dtype.str, shape, value.tobytes()) if _DTYPE.fullmatch(value.dtype.str) else None


def _make_numpy(name: str, shape: list | None, content: Any) -> object:
    """Returns the array; its shape must fit the data that came before anything of that size is made."""
    numpy = importlib.import_module("numpy")
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in shape or ()):
        raise ValueError("a shape is a list of sizes")
    if name == "O" and type(content) is list:
        flat = numpy.empty(len(content), dtype=object)
        for index, item in enumerate(content):
            flat[index] = item
    elif _DTYPE.fullmatch(name) and type(content) is bytes:
        flat = numpy.frombuffer(content, dtype=name).copy()
    else:
        raise ValueError("no type of numpy's plain ones")
    return flat.reshape(())[()] if shape is None else flat.reshape(shape)


# By the tag that they are sent with.
KINDS: dict[str, Kind] = {
    "bytearray": Kind(bytearray, lambda value: (memoryview(value).tobytes(),), _of(bytearray, bytes)),
    "complex": Kind(
        complex, lambda value: (complex.real.__get__(value), complex.imag.__get__(value)), _of(complex, float, float)
    ),
    "OrderedDict": Kind(
        OrderedDict, lambda value: (*map(list, OrderedDict.items(value)),), lambda *pairs: OrderedDict(_dict(pairs))
    ),
    "Counter": Kind(Counter, lambda value: (*map(list, dict.items(value)),), lambda *pairs: Counter(_dict(pairs))),
    "defaultdict": Kind(
        defaultdict,
        lambda value: (vars(defaultdict)["default_factory"].__get__(value), *map(list, dict.items(value))),
        lambda factory, *pairs: defaultdict(factory, _dict(pairs)),
    ),
    "set": _set(set),
    "frozenset": _set(frozenset),
    "deque": Kind(
        deque,
        lambda value: ([*deque.__iter__(value)], deque.maxlen.__get__(value)),
        _of(deque, list, (int, type(None))),
    ),
    "Decimal": Kind(Decimal, lambda value: (Decimal.__str__(value),), _of(Decimal, str)),
    "Fraction": Kind(Fraction, _fraction, _of(_make_fraction, int, int)),
    "timedelta": Kind(
        datetime.timedelta, attrgetter("days", "seconds", "microseconds"), _of(datetime.timedelta, int, int, int)
    ),
    "datetime": _time(datetime.datetime),
    "date": Kind(datetime.date, lambda value: (datetime.date.isoformat(value),), _of(datetime.date.fromisoformat, str)),
    "time": _time(datetime.time),
    # From here on, a subclass's instance is no value.
    "range": Kind(range, attrgetter("start", "stop", "step"), _of(range, int, int, int)),
    "slice": Kind(slice, attrgetter("start", "stop", "step"), slice),
    "type": Kind(type, lambda cls: (_NAMES[cls],) if cls in _NAMES else None, _of(TYPES.__getitem__, str)),
    "Ellipsis": Kind(type(...), lambda _: (), lambda: ...),
    "NotImplemented": Kind(type(NotImplemented), lambda _: (), lambda: NotImplemented),
    "memoryview": Kind(memoryview, _memory, _of(lambda data, form: memoryview(data).cast(form), bytes, str)),
    "array": Kind(array.array, lambda value: (value.typecode, value.tobytes()), _of(array.array, str, bytes)),
    "UUID": Kind(uuid.UUID, lambda value: (value.int,), _of(lambda number: uuid.UUID(int=number), int)),
    "timezone": Kind(datetime.timezone, lambda zone: zone.__getinitargs__(), datetime.timezone),
    "ZoneInfo": Kind(zoneinfo.ZoneInfo, lambda zone: zone.key and (zone.key,), _of(zoneinfo.ZoneInfo, str)),
    "keys": Kind(type({}.keys()), lambda view: (dict(view.mapping),), _of(dict.keys, dict)),
    "values": Kind(type({}.values()), lambda view: (dict(view.mapping),), _of(dict.values, dict)),
    "items": Kind(type({}.items()), lambda view: (dict(view.mapping),), _of(dict.items, dict)),
    **{cls.__name__: Kind(cls, lambda path: (str(path),), _of(cls, str)) for cls in _PATHS},
    "numpy": Kind(type("numpy", (), {}), _numpy, _of(_make_numpy, str, (list, type(None)), object)),
}
_TAGS = {kind.cls: tag for tag, kind in KINDS.items()}


def tag_of(cls: type) -> str | None:
    """Returns the tag of the kind that values of exactly that class are of."""
    return "numpy" if type(cls) is type and cls.__module__ == "numpy" else _TAGS.get(cls)


def record_type(type_name: str, names: tuple[str, ...]) -> type:
    """Returns a named tuple's class; the same one for the same names, where they are small."""
    make = _record_type if sum(map(len, names)) <= _KEPT_CHARACTERS else _record_type.__wrapped__
    return make(type_name[:_KEPT_CHARACTERS], names)


@functools.lru_cache(maxsize=1024)
def _record_type(type_name: str, names: tuple[str, ...]) -> type:
    # A name that no named tuple of the program's can have is replaced by the number of the place.
    return namedtuple(type_name if type_name.isidentifier() else "Record", names, rename=True)
