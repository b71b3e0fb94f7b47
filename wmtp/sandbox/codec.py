"""Values as JSON, tagged so that both sides rebuild exactly the value that was meant, and nothing else.

JSON's own null, booleans, strings, floats, arrays (lists) and integers within 2**53 stand for themselves; all else is
an object with one key, its tag. Subclasses are read through their base type's own methods and arrive as the base type,
so that no code of the program's classes runs in the judge. What is no value (a function, a generator, an instance of
the program's classes) is left to the caller, who sends a reference. Rarer values are in `library_values`.
"""

import datetime
import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

from wmtp.sandbox import library_values
from wmtp.sandbox.set_order import ordered_set
from wmtp.sandbox.wire import room

MAX_DEPTH = 400
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, ImportError)
_MAX_FRACTION_BITS = 1 << 17
_SAFE_INT = 1 << 53
_MUTABLE = (list, dict, set, deque, bytearray)
IMMUTABLE = (int, float, complex, str, bytes, tuple, frozenset)
_DATETIME_TYPES = {"datetime": datetime.datetime, "date": datetime.date, "time": datetime.time}


class AnswerTooLarge(ValueError):
    """The encoded value would exceed the size agreed on."""


class TooDeep(ValueError):
    """The value is nested deeper than `MAX_DEPTH`, or contains itself."""


class Encoder:
    """Encodes values.

    Args:
        reference: called with what is no value; returns its encoding (a tagged object).
        max_bytes: rough bound on the size of one value; more raises `AnswerTooLarge`.
        own: called with an instance of a subclass of a builtin type; returns the content of a handle, which is sent
            beside the value, or the whole encoding, or None: the value alone.
    """

    def __init__(
        self,
        reference: Callable[[object], dict],
        max_bytes: int = 1 << 62,
        own: Callable[[object], list | dict | None] = lambda value: None,
    ) -> None:
        self._reference, self._own = reference, own
        self._max_bytes = max_bytes
        self._size = 0

    def encode(self, value: object) -> object:
        """Returns the JSON-ready form of `value`; raises `AnswerTooLarge` or `TooDeep`."""
        self._size = 0
        with room(6 * MAX_DEPTH):
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
            raise TooDeep(f"nested deeper than {MAX_DEPTH} levels")
        if cls is list:
            return [self._encode(item, depth + 1) for item in value]
        if cls is tuple:
            return {"t": [self._encode(item, depth + 1) for item in value]}
        if cls is dict:
            return {"d": self._pairs(value.items(), depth)}
        return self._other(value, cls, depth + 1)

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

    def _other(self, value: object, cls: type, depth: int) -> object:
        """Encodes rarer types, and subclasses by their base type's methods (`isinstance` would believe `__class__`)."""
        content = library_values.encode(value, cls, lambda item: self._encode(item, depth), self._grow)
        if content is not None:
            return content
        base, encode = next(((base, encode) for base, encode in _BASES if issubclass(cls, base)), (None, None))
        if base is None:
            return self._reference(value)
        own = self._own(value) if cls is not base and issubclass(base, _MUTABLE + IMMUTABLE) else None
        if type(own) is dict:
            return own
        content = encode(self, value, depth)
        if own is not None and issubclass(base, _MUTABLE):
            return {"h": [*own, content]}
        return content if own is None else {"S": [own, content]}

    def _bytes(self, value: bytes | bytearray, tag: str) -> dict:
        self._grow(2 * memoryview(value).nbytes)
        return {tag: memoryview(value).hex()}

    def _tuple(self, value: tuple, depth: int) -> dict:
        items = self._items(tuple.__iter__(value), depth)
        names = _field_names(value)
        return {"n": [names, items, str(type.__getattribute__(type(value), "__name__"))]} if names else {"t": items}

    def _set(self, value: set | frozenset, base: type, depth: int) -> list:
        """Returns the size of its table, and the items in the order of the table."""
        return [base.__sizeof__(value), *self._items(base.__iter__(value), depth)]

    def _fraction(self, value: Fraction) -> dict:
        parts = int(value.numerator), int(value.denominator)
        if max(part.bit_length() for part in parts) > _MAX_FRACTION_BITS:
            return self._reference(value)
        return {"F": [self._int(part) for part in parts]}

    def _time(self, value: datetime.datetime | datetime.time, name: str, depth: int) -> dict:
        """Keeps local time and zone apart: a zone has more to it than today's offset."""
        zone, local = value.tzinfo, _DATETIME_TYPES[name].replace(value, tzinfo=None)
        return {"D": [name, _DATETIME_TYPES[name].isoformat(local), self._encode(zone, depth), value.fold]}


# Base types, each before its own base types, with the encoding of a value read through the base type's methods.
_BASES: list[tuple[type, Callable[[Encoder, object, int], object]]] = [
    (int, lambda encoder, value, _: encoder._int(int.__int__(value))),
    (float, lambda encoder, value, _: float.__float__(value)),
    (str, lambda encoder, value, _: encoder._str(str.__str__(value))),
    (bytes, lambda encoder, value, _: encoder._bytes(value, "b")),
    (bytearray, lambda encoder, value, _: encoder._bytes(value, "B")),
    (complex, lambda encoder, value, _: {"c": [complex.real.__get__(value), complex.imag.__get__(value)]}),
    (list, lambda encoder, value, depth: encoder._items(list.__iter__(value), depth)),
    (tuple, lambda encoder, value, depth: encoder._tuple(value, depth)),
    (OrderedDict, lambda encoder, value, depth: {"O": encoder._pairs(OrderedDict.items(value), depth)}),
    (Counter, lambda encoder, value, depth: {"C": encoder._pairs(dict.items(value), depth)}),
    (
        defaultdict,
        lambda encoder, value, depth: {
            "y": [
                encoder._encode(defaultdict.default_factory.__get__(value), depth),
                encoder._pairs(dict.items(value), depth),
            ]
        },
    ),
    (dict, lambda encoder, value, depth: {"d": encoder._pairs(dict.items(value), depth)}),
    (set, lambda encoder, value, depth: {"s": encoder._set(value, set, depth)}),
    (frozenset, lambda encoder, value, depth: {"f": encoder._set(value, frozenset, depth)}),
    (range, lambda encoder, value, _: {"r": [encoder._int(part) for part in (value.start, value.stop, value.step)]}),
    (
        deque,
        lambda encoder, value, depth: {
            "q": [encoder._items(deque.__iter__(value), depth), deque.maxlen.__get__(value)]
        },
    ),
    (Decimal, lambda encoder, value, _: {"m": encoder._str(Decimal.__str__(value))}),
    (Fraction, lambda encoder, value, _: encoder._fraction(value)),
    (
        datetime.timedelta,
        lambda encoder, value, _: {"D": ["timedelta", [value.days, value.seconds, value.microseconds]]},
    ),
    (datetime.datetime, lambda encoder, value, depth: encoder._time(value, "datetime", depth)),
    (datetime.date, lambda encoder, value, _: {"D": ["date", datetime.date.isoformat(value)]}),
    (datetime.time, lambda encoder, value, depth: encoder._time(value, "time", depth)),
]
BUILTIN = {base for base, _ in _BASES}


class Decoder:
    """Rebuilds values; malformed input raises one of `MALFORMED`.

    Args:
        reference: called with (tag, content) of an object that is no value; returns what it stands for.
        record: class of a named tuple from its name and the names of its fields.
    """

    def __init__(
        self,
        reference: Callable[[str, object], object],
        record: Callable[[str, tuple[str, ...]], type] = library_values.record_type,
    ) -> None:
        self._reference = reference
        self._record = record
        self.disordered = False  # whether a set has come out in another order than it had

    def decode(self, data: object) -> object:
        """Returns the value that `Encoder.encode` was given."""
        with room(12 * MAX_DEPTH):
            return self._decode(data)

    def _decode(self, data: object) -> object:
        cls = type(data)
        if cls is list:
            return [self._decode(item) for item in data]
        if cls is not dict:
            return data
        ((tag, content),) = data.items()
        builder = _BUILDERS.get(tag)
        return self._reference(tag, content) if builder is None else builder(self, content)

    def _list(self, content: object) -> list:
        if type(content) is not list:
            raise TypeError(f"expected an array, got {type(content).__name__}")
        return [self._decode(item) for item in content]

    def _pairs(self, content: list) -> list:
        return [(self._decode(key), self._decode(item)) for key, item in content]


def _field_names(value: tuple) -> list[str] | None:
    names = getattr(type(value), "_fields", None)
    if type(names) is tuple and len(names) == tuple.__len__(value) and all(type(name) is str for name in names):
        return list(names)
    return None


def _record(decoder: Decoder, content: list) -> tuple:
    """Returns a tuple whose items can also be reached by name."""
    names, items, *type_name = content
    values = decoder._list(items)
    if len(names) != len(values) or not all(type(name) is str for name in [*names, *type_name]):
        raise ValueError("a record needs a name for each item")
    return tuple.__new__(decoder._record(type_name[0] if type_name else "Record", tuple(names)), values)


def _set(decoder: Decoder, content: list, kind: type) -> set | frozenset:
    size, *items = decoder._list(content)
    made = ordered_set(kind, items, size)
    decoder.disordered = decoder.disordered or not all(map(operator.is_, made, items))
    return made


def _fraction(decoder: Decoder, content: list) -> Fraction:
    """Returns a fraction of two integers, in lowest terms; a forger's that are not only equal nothing."""
    numerator, denominator = decoder._list(content)
    if type(numerator) is not int or type(denominator) is not int or denominator < 1:
        raise ValueError("a fraction needs two integers")
    if max(numerator.bit_length(), denominator.bit_length()) > _MAX_FRACTION_BITS:
        raise ValueError("the fraction's parts are too long")  # their gcd would take quadratic time
    return Fraction(numerator, denominator)


def _defaultdict(decoder: Decoder, content: list) -> defaultdict:
    factory, pairs = content
    return defaultdict(decoder._decode(factory), decoder._pairs(pairs))


def _datetime(decoder: Decoder, content: list) -> object:
    name, text, *zone = content
    if name == "timedelta":
        return datetime.timedelta(*text)
    value = _DATETIME_TYPES[name].fromisoformat(text)
    return value.replace(tzinfo=decoder._decode(zone[0]), fold=zone[1]) if zone else value


def _complex(_: Decoder, content: list) -> complex:
    real, imaginary = content
    return complex(float(real), float(imaginary))


_BUILDERS: dict[str, Callable[[Decoder, object], object]] = {
    "t": lambda decoder, content: tuple(decoder._list(content)),
    "d": lambda decoder, content: dict(decoder._pairs(content)),
    "s": lambda decoder, content: _set(decoder, content, set),
    "f": lambda decoder, content: _set(decoder, content, frozenset),
    "i": lambda _, content: int(content, 16),
    "u": lambda _, content: bytes.fromhex(content).decode("utf-32-le", "surrogatepass"),
    "b": lambda _, content: bytes.fromhex(content),
    "B": lambda _, content: bytearray.fromhex(content),
    "c": _complex,
    "n": _record,
    "O": lambda decoder, content: OrderedDict(decoder._pairs(content)),
    "C": lambda decoder, content: Counter(dict(decoder._pairs(content))),
    "y": _defaultdict,
    "r": lambda decoder, content: range(*decoder._list(content)),
    "q": lambda decoder, content: deque(decoder._list(content[0]), content[1]),
    "m": lambda _, content: Decimal(content),
    "F": _fraction,
    "D": _datetime,
    "L": lambda decoder, content: library_values.decode(content, decoder._decode),
}
