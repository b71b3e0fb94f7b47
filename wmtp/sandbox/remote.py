"""Stand-ins, in the judge, for objects that live in the program's process.

A trusted test uses a `Remote` like the object itself. What comes back is a fresh value, or, for anything else (an
instance of the program's class, a generator, a function), another `Remote`. No comparison is ever put to the program:
an object that is no value equals no value. What compares two of the program's own objects is refused aloud; so is what
computes with one of them and a value of the test's, for that may be the expected one (`abs(f(x) - 7.5) < 1e-6`).
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, NoReturn

from wmtp.sandbox.operations import BINARY, OPERATIONS, UNARY
from wmtp.sandbox.supervise import described

_SERVED = ("__name__", "__qualname__", "__dict__", "__annotations__", "__module__")  # that tests look at
CONTAINERS = (list, dict, set, bytearray, deque, Counter, OrderedDict, defaultdict)
CONVERSIONS = ("int", "float", "complex", "index", "trunc", "floor", "ceil", "round")
_UNARY = (*UNARY, *CONVERSIONS)


def _asked(operation: str) -> Callable:
    return lambda self, /, *args, **kwargs: self._remote(operation, *args, **kwargs)


def _asked_for_text(operation: str) -> Callable:
    return lambda self, *args: str(self._remote(operation, *args))


class Own:
    """Base of all that stands for an object of the program's."""

    __slots__ = ()
    _remote_session: Any
    _remote_reference: dict
    _remote_changed: frozenset[str] = frozenset()  # operators that the program's class changes

    def _remote(self, operation: str, /, *args: object, **kwargs: object) -> object:
        return self._remote_session.request(operation, self, *args, **kwargs)

    def __getattr__(self, name: str) -> object:
        if name == "__signature__":
            kinds = inspect._ParameterKind
            described = self._remote("signature")
            parameters = [inspect.Parameter(name, kinds(kind), **default) for name, kind, default in described]
            return inspect.Signature(parameters)
        if name.startswith("__") and name.endswith("__") and name not in _SERVED:
            raise AttributeError(name)  # copy, pickle, numpy and others look for protocols
        return self._remote("attr", name)


class Remote(Own):
    """An object of the program's, by its handle.

    Args:
        abilities: which of the special methods it has; the class must be that of `remote_class` for them.
        base: the builtin container of whose subclass it is an instance; it then has that container's data.
        changed: operators that the subclass changes.
    """

    __slots__ = (
        *("_remote_abilities", "_remote_base", "_remote_changed", "_remote_looked", "_remote_reference"),
        "_remote_session",
    )
    _remote_looked: tuple[int, dict]  # when the program was last asked, and what it said to what

    def __init__(
        self,
        session: Any,
        reference: dict,
        abilities: str = "",
        base: type | None = None,
        changed: frozenset[str] = frozenset(),
        data: object = None,
    ) -> None:
        looked = (session.epoch, {} if base is None else {("data",): data})
        values = (abilities, base, changed, looked, reference, session)
        for name, value in zip(Remote.__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    def _remote_look(self, *asked: Any) -> Any:
        """Returns the answer to an operation and its arguments, asked once until the program does something else."""
        epoch, answers = self._remote_looked
        if epoch != self._remote_session.epoch:
            answers = {}
        if asked not in answers:
            answers[asked] = self._remote(*asked)
            object.__setattr__(self, "_remote_looked", (self._remote_session.epoch, answers))
        return answers[asked]

    def _remote_value(self) -> object:
        """Returns the data of an instance of a builtin container's subclass, else the object itself."""
        return self if self._remote_base is None else self._remote_look("data")

    def _remote_items(self) -> list | dict:
        """Returns all items of a container: as many as it says, or its answer is wrong whatever is made of it."""
        if self._remote_base is not None:
            return self._remote_value()
        size, items = self._remote_look("items")
        if type(items) is not list or size != len(items):
            raise self._remote_session.stop("wrong_answer", f"an object of {size!s:.40} items yields others")
        return items

    def _remote_agree(self, left: object, right: object) -> bool:
        """Returns whether two answers may be the same object: nothing is said of two of the program's own."""
        shown = self._remote_session.shown
        return (is_remote(left) and is_remote(right)) or shown(left) == shown(right) or bool(left == right)

    __setattr__, __delattr__ = _asked("set_attr"), _asked("delete_attr")
    __setitem__, __delitem__ = _asked("set_item"), _asked("delete_item")
    __str__, __repr__, __format__ = map(_asked_for_text, ("str", "repr", "format"))

    def __getitem__(self, key: object) -> object:
        item = self._remote("item", key)
        if self._remote_base in (list, deque) and type(key) is int:
            items = self._remote_value()
            if -len(items) <= key < len(items) and not self._remote_agree(items[key], item):
                reason = f"a {self._remote_base.__name__} gives two items for place {key}"
                raise self._remote_session.stop("wrong_answer", reason)
        return item

    def __contains__(self, item: object) -> bool:
        if not {"i", "n"} & set(self._remote_abilities):
            raise self._remote_session.refuse("asks an object of the program's own what it contains")
        return any(item is other or item == other for other in self)  # compared here, not by the program's __eq__

    @property
    def __class__(self):
        return self._remote_base or type(self)

    def __bool__(self) -> bool:
        if self._remote_base is None and "b" in self._remote_abilities:
            return self._remote_look("bool") is True
        return _length(self) > 0 if "l" in self._remote_abilities else True

    def __instancecheck__(self, instance: object) -> bool:
        if isinstance(instance, AssertionError) and instance is not self._remote_session.raised:
            raise self._remote_session.stop("wrong_answer", described(instance))
        return self._remote("has_instance", instance) is True

    def __subclasscheck__(self, cls: type) -> bool:
        if cls is AssertionError and type(self._remote_session.raised) is not AssertionError:
            raise self._remote_session.stop("wrong_answer", "AssertionError: asked for a class of the program's own")
        return self._remote("has_subclass", cls) is True

    def __eq__(self, other: object) -> bool:
        left, right = value_of(self), value_of(other)
        if is_remote(left) and is_remote(right):
            raise self._remote_session.refuse("compares two objects of the program's own")
        if is_remote(left) or is_remote(right):
            self._remote_session.remark("an object of the program's own class equals no value")
            return False
        return left == right

    def __ne__(self, other: object) -> bool:
        left, right = value_of(self), value_of(other)
        return left != right if not (is_remote(left) or is_remote(right)) else not self == other

    def __hash__(self) -> int:
        return 0  # the same for all: two of them in one set or dict are compared, and that is refused

    def __mro_entries__(self, bases: tuple) -> NoReturn:
        raise self._remote_session.refuse("derives a class from one of the program's")

    def __copy__(self) -> object:
        value = value_of(self)
        return value._remote("copy") if is_remote(value) else copy.copy(value)

    def __deepcopy__(self, memo: dict) -> object:
        value = value_of(self)
        return value._remote("deepcopy") if is_remote(value) else copy.deepcopy(value, memo)


class Name(Remote):
    """What the program has under a name, looked up afresh at each use.

    A name that holds a value behaves as that value; as an argument it is the program's object itself.
    """

    __slots__ = ()

    def _remote_value(self) -> object:
        return value_of(self._remote_look("get"))

    __call__ = _asked("call")


def is_remote(value: object) -> bool:
    """Returns whether it is a stand-in for an object, by its real class: its `__class__` may be another."""
    return issubclass(type(value), Remote)


def value_of(value: object) -> object:
    """Returns a stand-in's data, where it has data; anything else as it is."""
    return value._remote_value() if is_remote(value) else value


def _unary(name: str) -> Callable:
    def apply(self: Remote, *args: object) -> object:
        value = value_of(self)
        if is_remote(value):
            return value._remote_look(name, *args) if name in CONVERSIONS else value._remote(name, *args)
        return OPERATIONS[name](value, *args)

    return apply


def _binary(name: str, reflected: bool = False) -> Callable:
    """Returns an operator: put to the program where both operands are its own, done here where both are data."""

    def apply(self: Own, other: object) -> object:
        left, right = (other, self) if reflected else (self, other)
        values = [value_of(left), value_of(right)]
        if any(map(is_remote, values)) or name in self._remote_changed:
            if not (issubclass(type(left), Own) and issubclass(type(right), Own)):
                reason = f"computes ({name}) with an object of the program's and another value"
                raise self._remote_session.refuse(reason)
            return self._remote_session.request(name, left, right)
        return OPERATIONS[name](*values)

    return apply


def _ordering(name: str) -> Callable:
    def apply(self: Remote, other: object) -> object:
        values = [value_of(self), value_of(other)]
        if any(map(is_remote, values)):
            raise self._remote_session.refuse("orders objects of the program's own")
        return getattr(operator, name)(*values)

    return apply


def _iterate(self: Remote) -> Iterator:
    if self._remote_base is not None or "l" in self._remote_abilities:
        return iter(self._remote_items())
    return self._remote_session.walked(self._remote_reference, iter(self._remote("iter")))


def _length(self: Remote) -> int:
    if self._remote_base is None and "i" not in self._remote_abilities:
        return operator.index(self._remote_look("len"))
    return len(self._remote_items())


def _leave(operation: str) -> Callable:
    def leave(self: Remote, kind: type | None, error: BaseException | None, traceback: object) -> bool:
        """Tells the program's context manager; no exception ends in it, nor does a failed assertion become another."""
        session = self._remote_session
        if isinstance(error, AssertionError) and error is not session.raised:
            raise session.stop("wrong_answer", described(error))
        if session.failure is None and self._remote(operation, kind and kind.__name__) and kind:
            raise session.refuse("needs a context manager of the program's to swallow an exception")
        return False

    return leave


def _await(self: Remote) -> Generator:
    return self._remote("run")
    yield


def _send(self: Remote, _: object) -> NoReturn:
    raise StopIteration(self._remote("run"))


def _throw(self: Remote, error: BaseException, *_: object) -> NoReturn:
    raise error


def _later(method: Callable) -> Callable:
    async def later(self: Remote, *args: object) -> object:
        return method(self, *args)

    return later


_METHODS: dict[str, dict[str, Callable]] = {
    "l": {"__len__": _length},
    "i": {"__iter__": _iterate},
    "n": {"__next__": _asked("next"), "__iter__": lambda self: self},
    "c": {"__call__": _asked("call")},
    "w": {"__enter__": _asked("enter"), "__exit__": _leave("exit")},
    # An event loop keeps coroutines in dicts; each is one of its own.
    "a": {
        "__await__": _await,
        "send": _send,
        "throw": _throw,
        "close": lambda self: None,
        "__hash__": lambda self: hash(self._remote_reference.get("h")),
        "__eq__": lambda self, other: is_remote(other) and self._remote_reference == other._remote_reference,
    },
    "A": {"__aiter__": _asked("aiter")},
    "N": {"__anext__": _later(_asked("anext"))},
    "W": {"__aenter__": _later(_asked("aenter")), "__aexit__": _later(_leave("aexit"))},
}


ABILITIES = frozenset(_METHODS)

# In an instance the class's own __doc__ would hide the object's.
_DOC = property(lambda self: self._remote("attr", "__doc__"))


@functools.lru_cache(maxsize=256)
def remote_class(abilities: str) -> type[Remote]:
    """Returns the class of the stand-ins for objects that can do just that."""
    methods = {name: method for sign in abilities for name, method in _METHODS.get(sign, {}).items()}
    if "n" in abilities:  # an iterator's length is nothing that its items could be held against
        methods.pop("__len__", None)
    return type("Remote", (Remote,), {"__slots__": (), "__doc__": _DOC, **methods})


@functools.lru_cache(maxsize=1024)
def value_class(base: type, name: str, changed: frozenset[str]) -> type:
    """Returns a class of values of a subclass of `base`: the value is the base's, all else is asked of the program."""
    makers = dict.fromkeys(BINARY, _binary) | dict.fromkeys(("str", "repr", "format"), _asked_for_text)
    methods = {f"__{operation}__": makers.get(operation, _asked)(operation) for operation in changed}
    return type(name if name.isidentifier() else "Own", (Own, base), {**methods, "_remote_changed": changed})


def _complete() -> None:
    Name.__doc__ = _DOC
    for name in _UNARY:
        setattr(Remote, f"__{name}__", _unary(name))
    for name in BINARY:
        setattr(Remote, f"__{name}__", _binary(name))
        setattr(Remote, f"__r{name}__", _binary(name, reflected=True))
    for name in ("lt", "le", "gt", "ge"):
        setattr(Remote, f"__{name}__", _ordering(name))
    for function in (len, iter, next, bool, str, repr, format, operator.getitem, operator.contains):
        setattr(Name, f"__{function.__name__}__", lambda self, *args, _do=function: _do(self._remote_value(), *args))
    for sign in "wAW":
        for name in _METHODS[sign]:
            setattr(Name, name, lambda self, *args, _name=name: getattr(self._remote_value(), _name)(*args))


_complete()
