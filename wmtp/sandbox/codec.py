"""Values as JSON, tagged so that both sides rebuild exactly the value that was meant, and nothing else.

JSON's own null, booleans, strings, floats, arrays (lists) and integers within 2**53 stand for themselves; all else is
an object with one key, its tag. Subclasses are read through their base type's own methods and arrive as the base type,
so that no code of the program's classes runs in the judge. What is no value (a function, a generator, an instance of
the program's classes) is left to the caller, who sends a reference.
"""

import datetime
import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

from wmtp.sandbox.kinds import KINDS, record_type, tag_of
from wmtp.sandbox.wire import room

MAX_DEPTH = 400
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
MALFORMED += (ImportError, SyntaxError)
_SAFE_INT = 1 << 53
MUTABLE = (list, dict, set, deque, bytearray)
IMMUTABLE = (int, float, complex, str, bytes, tuple, frozenset)
# Those of these that are no `Kind`, with what makes one of a subclass's instance.
_PLAIN: dict[type, Callable] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: lambda value: memoryview(value).tobytes(),
    list: lambda value: [*list.__iter__(value)],
    tuple: lambda value: (*tuple.__iter__(value),),
    dict: lambda value: dict(dict.items(value)),
}
_DATETIMES = (datetime.timedelta, datetime.datetime, datetime.date, datetime.time)
# What an instance of a subclass is sent as, each before its own base types.
BASES = (OrderedDict, Counter, defaultdict, *MUTABLE, *IMMUTABLE, Decimal, Fraction, *_DATETIMES)


class Unsendable(ValueError):
    """The value exceeds the size agreed on, or is nested deeper than `MAX_DEPTH`, or contains itself."""


class Encoder:
    """Encodes values.

    Args:
        reference: called with what is no value; returns its encoding (a tagged object).
        max_bytes: rough bound on the size of one value; more raises `Unsendable`.
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
        """Returns the JSON-ready form of `value`; raises `Unsendable`."""
        self._size = 0
        with room(8 * MAX_DEPTH):
            return self._encode(value, 0)

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self._max_bytes:
            raise Unsendable(f"takes more than {self._max_bytes} bytes")

    def _encode(self, value: object, depth: int) -> object:
        self._grow(2)
        cls = type(value)
        if value is None or cls is bool or cls is float:
            return value
        if cls is int:
            if -_SAFE_INT < value < _SAFE_INT:
                return value
            self._grow(value.bit_length() // 4)
            return {"i": format(value, "x")}  # hexadecimal: linear time, and no limit on the number of digits
        if cls is str:
            return self._str(value)
        if cls is bytes:
            self._grow(2 * len(value))
            return {"b": value.hex()}
        if depth > MAX_DEPTH:  # also every cycle ends here
            raise Unsendable(f"is nested deeper than {MAX_DEPTH} levels, or contains itself")
        if cls is list:
            return [self._encode(item, depth + 1) for item in value]
        if cls is tuple:
            return {"t": [self._encode(item, depth + 1) for item in value]}
        if cls is dict:
            return {"d": [[self._encode(key, depth + 1), self._encode(item, depth + 1)] for key, item in value.items()]}
        tag = tag_of(cls)
        return self._instance(value, cls, depth) if tag is None else self._parts(tag, value, depth)

    def _str(self, value: str) -> object:
        self._grow(len(value))
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:  # JSON would join two escaped halves of a surrogate pair into one character
                return {"u": value.encode("utf-32-le", "surrogatepass").hex()}
        return value

    def _parts(self, tag: str, value: object, depth: int) -> dict:
        parts = KINDS[tag].parts(value)
        if parts is None:
            return self._reference(value)
        return {tag: [self._encode(part, depth + (type(part) is not list)) for part in parts]}  # a list counts itself

    def _instance(self, value: object, cls: type, depth: int) -> object:
        """Encodes an instance of a subclass by its base type's methods (`isinstance` would believe `__class__`)."""
        base = next((base for base in BASES if issubclass(cls, base)), None)
        if base is None:
            return self._reference(value)
        own = self._own(value) if issubclass(base, MUTABLE + IMMUTABLE) else None
        if type(own) is dict:
            return own
        if base not in _PLAIN:
            content: object = self._parts(tag_of(base), value, depth)
        elif base is tuple and (names := _field_names(value)):
            record = names, [*tuple.__iter__(value)], str(type.__getattribute__(cls, "__name__"))
            content = {"record": [self._encode(part, depth) for part in record]}
        else:
            content = self._encode(_PLAIN[base](value), depth)
        return content if own is None else {"h": [*own, content]}


class Decoder:
    """Rebuilds values; malformed input raises one of `MALFORMED`.

    Args:
        reference: called with (tag, content) of an object that is no value; returns what it stands for.
        record: class of a named tuple from its name and the names of its fields.
    """

    def __init__(
        self,
        reference: Callable[[str, object], object],
        record: Callable[[str, tuple[str, ...]], type] = record_type,
    ) -> None:
        self._reference, self._record = reference, record
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
        if tag in _TEXTS:
            return _TEXTS[tag](content)
        if tag == "d":
            return {self._decode(key): self._decode(item) for key, item in content}
        if tag not in KINDS and tag not in ("t", "record"):
            return self._reference(tag, content)
        if type(content) is not list:
            raise TypeError(f"expected an array, got {type(content).__name__}")
        parts = [self._decode(item) for item in content]
        if tag == "t":
            return tuple(parts)
        if tag == "record":
            return self._make_record(*parts)
        value = KINDS[tag].make(*parts)
        if tag in ("set", "frozenset"):
            self.disordered = self.disordered or not all(map(operator.is_, value, parts[1]))
        return value

    def _make_record(self, names: list, values: list, type_name: str) -> tuple:
        if not type(names) is type(values) is list or len(names) != len(values):
            raise ValueError("a record is a list of names and one of items")
        if not all(type(name) is str for name in [*names, type_name]):
            raise ValueError("a record needs a name for each item")
        return tuple.__new__(self._record(type_name, tuple(names)), values)


_TEXTS: dict[str, Callable] = {
    "i": lambda text: int(text, 16),
    "u": lambda text: bytes.fromhex(text).decode("utf-32-le", "surrogatepass"),
    "b": bytes.fromhex,
}


def _field_names(value: tuple) -> list[str] | None:
    names = getattr(type(value), "_fields", None)
    if type(names) is tuple and len(names) == tuple.__len__(value) and all(type(name) is str for name in names):
        return list(names)
    return None
