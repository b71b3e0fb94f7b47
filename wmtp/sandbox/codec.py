"""Values as JSON, tagged so that both sides rebuild exactly the builtin value that was meant, and nothing else.

JSON's own null, booleans, strings, floats, arrays (lists) and integers within 2**53 stand for themselves; all else is
an object with one key, its tag. Subclasses are read through their base type's own methods and arrive as the base type,
so that no code of the program's classes runs in the judge. What is no value (a function, a generator, an instance of
the program's classes) is left to the caller, who sends a reference.
"""

import datetime
import functools
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

MAX_DEPTH = 100
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
_MAX_FRACTION_BITS = 1 << 17
_SAFE_INT = 1 << 53
_DATETIME_TYPES = {
    "datetime": datetime.datetime,
    "date": datetime.date,
    "time": datetime.time,
}


class AnswerTooLarge(ValueError):
    """The encoded value would exceed the size agreed on."""


class Encoder:
    """Encodes values.

    Args:
        reference: called with what is no value; returns its encoding (a tagged object).
        max_bytes: rough bound on the size of one value; more raises `AnswerTooLarge`.
    """

    def __init__(self, reference: Callable[[object], dict], max_bytes: int | None = None) -> None:
        self._reference = reference
        self._max_bytes = sys.maxsize if max_bytes is None else max_bytes
        self._size = 0

    def encode(self, value: object) -> object:
        """JSON-ready form of `value`."""
        self._size = 0
        return self._encode(value, 0)

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self._max_bytes:
            raise AnswerTooLarge(f"a value takes more than {self._max_bytes} bytes")

    def _encode(self, value: object, depth: int) -> object:
        self._grow(2)
        cls = type(value)
        if value is None or cls is bool or cls is float:
            return value
        if cls is int:
            return self._int(value)
        if cls is str:
            return self._str(value)
        if depth > MAX_DEPTH:  # also every cycle ends here
            return self._reference(value)
        if cls is list:
            return [self._encode(item, depth + 1) for item in value]
        if cls is tuple:
            return {"t": [self._encode(item, depth + 1) for item in value]}
        if cls is dict:
            return {"d": self._pairs(value.items(), depth)}
        return self._other(value, depth + 1)

    def _int(self, value: int) -> object:
        if -_SAFE_INT < value < _SAFE_INT:
            return value
        self._grow(value.bit_length() // 4)
        return {"i": format(value, "x")}  # hexadecimal: linear time, and no limit on the number of digits

    def _str(self, value: str) -> object:
        self._grow(len(value))
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:  # JSON would join two escaped halves of a surrogate pair into one character
                return {"u": value.encode("utf-32-le", "surrogatepass").hex()}
        return value

    def _items(self, values: object, depth: int) -> list:
        return [self._encode(item, depth) for item in values]

    def _pairs(self, pairs: object, depth: int) -> list:
        return [[self._encode(key, depth + 1), self._encode(item, depth + 1)] for key, item in pairs]

    def _other(self, value: object, depth: int) -> object:
        """Rarer types, and subclasses by their base type's methods (`isinstance` would believe a `__class__`)."""
        cls = type(value)
        if issubclass(cls, int):
            return self._int(int.__int__(value))
        if issubclass(cls, float):
            return float.__float__(value)
        if issubclass(cls, str):
            return self._str(str.__str__(value))
        if issubclass(cls, bytes | bytearray):
            base = bytes if issubclass(cls, bytes) else bytearray
            self._grow(2 * base.__len__(value))
            return {"b" if base is bytes else "B": memoryview(value).hex()}
        if issubclass(cls, complex):
            return {"c": [value.real, value.imag]}
        if issubclass(cls, list):
            return self._items(list.__iter__(value), depth)
        if issubclass(cls, tuple):
            names = _field_names(value)
            items = self._items(tuple.__iter__(value), depth)
            return {"n": [names, items]} if names else {"t": items}
        if issubclass(cls, OrderedDict):
            return {"O": self._pairs(OrderedDict.items(value), depth)}
        if issubclass(cls, Counter):
            return {"C": self._pairs(dict.items(value), depth)}
        if issubclass(cls, dict):
            return {"d": self._pairs(dict.items(value), depth)}
        if issubclass(cls, set):
            return {"s": self._items(set.__iter__(value), depth)}
        if issubclass(cls, frozenset):
            return {"f": self._items(frozenset.__iter__(value), depth)}
        if issubclass(cls, range):
            return {"r": [self._int(part) for part in (value.start, value.stop, value.step)]}
        if issubclass(cls, deque):
            return {"q": [self._items(deque.__iter__(value), depth), value.maxlen]}
        if issubclass(cls, Decimal):
            return {"m": self._str(Decimal.__str__(value))}
        if issubclass(cls, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) <= (
            _MAX_FRACTION_BITS
        ):
            return {"F": [self._int(int(value.numerator)), self._int(int(value.denominator))]}
        if issubclass(cls, datetime.timedelta):
            return {"D": ["timedelta", [value.days, value.seconds, value.microseconds]]}
        for name, base in _DATETIME_TYPES.items():  # datetime first: it is a date
            if issubclass(cls, base):
                return {"D": [name, base.isoformat(value)]}
        numpy = sys.modules.get("numpy")
        if numpy is not None and issubclass(cls, numpy.generic):
            item = value.item()
            if item is not value and not isinstance(item, numpy.generic):
                return self._encode(item, depth)
        return self._reference(value)


class Decoder:
    """Rebuilds values; malformed input raises one of `MALFORMED`.

    Args:
        reference: called with (tag, content) of an object that is no value; returns what it stands for.
    """

    def __init__(self, reference: Callable[[str, object], object]) -> None:
        self._reference = reference

    def decode(self, data: object) -> object:
        """The value that `Encoder.encode` was given."""
        cls = type(data)
        if cls is list:
            return [self.decode(item) for item in data]
        if cls is not dict:
            return data
        ((tag, content),) = data.items()
        builder = _BUILDERS.get(tag)
        return self._reference(tag, content) if builder is None else builder(self, content)

    def _list(self, content: object) -> list:
        if type(content) is not list:
            raise TypeError(f"expected an array, got {type(content).__name__}")
        return [self.decode(item) for item in content]

    def _pairs(self, content: list) -> list:
        return [(self.decode(key), self.decode(item)) for key, item in content]


def _field_names(value: tuple) -> list[str] | None:
    names = getattr(type(value), "_fields", None)
    if type(names) is tuple and len(names) == tuple.__len__(value) and all(type(name) is str for name in names):
        return list(names)
    return None


def _record(decoder: Decoder, content: list) -> tuple:
    """A tuple whose items can also be reached by name: a class made here, without any code of the program's."""
    names, items = content
    values = decoder._list(items)
    if len(names) != len(values) or not all(type(name) is str for name in names):
        raise ValueError("a record needs a name for each item")
    return _record_type(tuple(names))(values)


@functools.lru_cache(maxsize=256)
def _record_type(names: tuple[str, ...]) -> type:
    members: dict[str, object] = {"__slots__": (), "_fields": names}
    for index, name in enumerate(names):
        if not name.isidentifier() or name.startswith("_") or hasattr(tuple, name):
            continue  # reachable by index only
        members[name] = property(lambda self, index=index: tuple.__getitem__(self, index))
    return type("Record", (tuple,), members)


def _fraction(decoder: Decoder, content: list) -> Fraction:
    """Both parts must be integers; they come in lowest terms, and a forger's that do not only equal nothing."""
    numerator, denominator = decoder._list(content)
    if type(numerator) is not int or type(denominator) is not int or denominator < 1:
        raise ValueError("a fraction needs two integers")
    if max(numerator.bit_length(), denominator.bit_length()) > _MAX_FRACTION_BITS:
        raise ValueError("the fraction's parts are too long")  # their gcd would take quadratic time
    return Fraction(numerator, denominator)


def _integer(content: str) -> int:
    return int(content, 16)


def _range(decoder: Decoder, content: list) -> range:
    return range(*decoder._list(content))


def _datetime(_: Decoder, content: list) -> object:
    name, text = content
    return datetime.timedelta(*text) if name == "timedelta" else _DATETIME_TYPES[name].fromisoformat(text)


def _complex(_: Decoder, content: list) -> complex:
    real, imaginary = content
    return complex(float(real), float(imaginary))


_BUILDERS: dict[str, Callable[[Decoder, object], object]] = {
    "t": lambda decoder, content: tuple(decoder._list(content)),
    "d": lambda decoder, content: dict(decoder._pairs(content)),
    "s": lambda decoder, content: set(decoder._list(content)),
    "f": lambda decoder, content: frozenset(decoder._list(content)),
    "i": lambda _, content: _integer(content),
    "u": lambda _, content: bytes.fromhex(content).decode("utf-32-le", "surrogatepass"),
    "b": lambda _, content: bytes.fromhex(content),
    "B": lambda _, content: bytearray.fromhex(content),
    "c": _complex,
    "n": _record,
    "O": lambda decoder, content: OrderedDict(decoder._pairs(content)),
    "C": lambda decoder, content: Counter(dict(decoder._pairs(content))),
    "r": _range,
    "q": lambda decoder, content: deque(decoder._list(content[0]), content[1]),
    "m": lambda _, content: Decimal(content),
    "F": _fraction,
    "D": _datetime,
}
