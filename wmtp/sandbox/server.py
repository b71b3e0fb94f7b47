"""In the confined process, like `child`: answers the judge's requests about one program's namespace."""

import builtins
import functools
import importlib
import operator
import socket
import sys
import threading
import types
import warnings
from collections.abc import Iterator

from wmtp.sandbox import wire
from wmtp.sandbox.codec import BASES, Decoder, Encoder, Unsendable
from wmtp.sandbox.kinds import TYPES, record_type
from wmtp.sandbox.operations import OPERATIONS, OVERRIDABLE
from wmtp.sandbox.usage import is_refused_memory

MAX_MESSAGE = 10_000
_MAX_WARNINGS = 100  # of one request
_MAX_CAUSES = 3
# What an object can do, as the judge is told with its handle; `remote` gives the stand-in the same abilities.
_ABILITIES = {
    **{"l": ("__len__",), "b": ("__bool__",), "c": ("__call__",), "w": ("__exit__",), "a": ("__await__",)},
    **{"n": ("__next__",), "i": ("__iter__", "__getitem__"), "A": ("__aiter__",), "N": ("__anext__",)},
    "W": ("__aexit__",),
}
_PLAIN_RECORD = {*vars(record_type("Record", ("field",))), "__annotations__", "__orig_bases__"}
_EXCEPTION_ATTRIBUTES = (
    *("errno", "strerror", "filename", "filename2", "code", "name", "path", "obj", "msg", "text", "lineno", "offset"),
    *("object", "start", "end", "reason", "encoding"),
)


def new_module(name: str) -> types.ModuleType:
    """Returns a module that is found under its name: dataclasses, pickle and typing look their classes' module up."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module


def execute(source: str, name: str, namespace: dict) -> None:
    """Runs `source` with `namespace` for globals."""
    code = compile(source.removeprefix("\ufeff"), name, "exec", dont_inherit=True)
    exec(code, namespace)


class Server:
    """Answers requests on `channel`, each answer of at most `max_bytes`."""

    def __init__(self, channel: socket.socket, max_bytes: int) -> None:
        self.namespace = new_module("program").__dict__
        self._channel = channel
        self._lock = threading.RLock()  # of the channel, while the program runs; its threads may call back
        self._nonces: list[str] = []  # of the requests being answered, the innermost last
        self._objects: list[object] = []  # handle -> object
        self._numbers: dict[int, int] = {}  # of those objects, by id: the same object is the same to the judge
        self._abilities: dict[int, str] = {}  # of the classes of those objects, by id
        self._bare: object = None  # sent by its value alone
        self._classes: dict[type, int] = {}  # exception classes of the program's -> handle
        self._expressions: dict[str, object] = {}  # entry points, evaluated once
        self._instances: list[object] = []  # objects of the request being answered
        self._exports: dict[int, object] = {}  # what stands for the tests' functions and iterators
        self._warnings: list[tuple] = []
        execute_test = functools.partial(execute, name="test.py", namespace=self.namespace)
        self._operations = {"load": self._load, "execute": execute_test}
        self._encoder = Encoder(self._reference, max_bytes, self._own)
        self._decoder = Decoder(self._resolve, self._record)

    def serve(self) -> None:
        """Answers until the judge hangs up; the first request brings the program."""
        while (request := wire.receive(self._channel)) is not None:
            self._reply(request)

    def _reply(self, request: dict) -> None:
        nonce = request["nonce"]
        self._nonces.append(nonce)
        outer, self._warnings = self._warnings, []
        try:
            reply: dict = {"value": self._answer(request)}
        except Unsendable as error:
            reply = {"unsendable": str(error)}
        except BaseException as error:
            reply = {"error": self._describe(error)}
        if issued := self._warnings:
            reply["warnings"] = [[self._exception_class(category), text, line] for category, text, line in issued]
        with self._lock:
            self._nonces.pop()
            self._warnings = outer
            wire.send(self._channel, {"nonce": nonce, **reply})

    def _load(self, program: str, setup: str, entry_point: str | None, inside: bool) -> None:
        """Runs the program and the set-up for tests in the judge, or `inside`, in the program's own namespace."""
        if not inside:
            warnings.simplefilter("always")  # whether one is shown is for the tests to say
            warnings.showwarning = self._collect
        execute(program, "program.py", self.namespace)
        execute(setup, "setup.py", self.namespace)
        if entry_point:
            self._expressions[entry_point] = target = eval(entry_point, self.namespace)
            if inside:
                self.namespace["candidate"] = target
                self.namespace.setdefault(entry_point.rpartition(".")[2], target)
        self._warnings = []

    def _answer(self, request: dict) -> object:
        arguments, keywords = self._arguments(request)
        self._bare = arguments[0] if request["op"] == "data" else None
        operation = self._operations.get(request["op"]) or OPERATIONS[request["op"]]
        return self._encoder.encode(operation(*arguments, **keywords))

    def _arguments(self, message: dict) -> tuple[list, dict]:
        self._make_instances(message.get("o", ()))
        arguments = [self._decoder.decode(data) for data in message["a"]]
        return arguments, {name: self._decoder.decode(data) for name, data in message.get("k", {}).items()}

    # What the judge sends

    def _resolve(self, tag: str, content: object) -> object:
        if tag == "@":
            return self._name(content)
        if tag == "h":
            return self._objects[content]
        if tag == "o":
            return self._instances[content]
        if tag == "p":
            module, _, path = content.partition(":")
            value = importlib.import_module(module)
            return operator.attrgetter(path)(value) if path else value
        if tag == "j":
            return self._exported(*content)
        raise ValueError(f"unknown tag {tag!r}")

    def _name(self, name: str) -> object:
        for names in (self._expressions, self.namespace, vars(builtins)):
            if name in names:
                return names[name]
        raise NameError(f"name {name!r} is not defined")

    def _record(self, type_name: str, names: tuple[str, ...]) -> type:
        """Returns the program's own named tuple of that name, if it has the same fields."""
        cls = self.namespace.get(type_name)
        own = isinstance(cls, type) and issubclass(cls, tuple) and getattr(cls, "_fields", None) == names
        return cls if own else record_type(type_name, names)

    def _make_instances(self, described: list) -> None:
        """Makes objects of the test's own classes into objects of the program's class of that name, or of a new one."""
        if not described:
            return
        made: dict[str, type] = {}
        self._instances = []
        for name, _, original in described:
            cls = self.namespace.get(name)
            if not isinstance(cls, type):
                cls = made.setdefault(name, type(name, (_OfTheTest,), {}))
            self._instances.append(instance := object.__new__(cls))
            if isinstance(instance, _OfTheTest):
                object.__setattr__(instance, "_ask", lambda name, n=original: self._call_back(n, "attr", (name,), {}))
        for instance, (_, attributes, _) in zip(self._instances, described, strict=True):
            for name, data in attributes:
                object.__setattr__(instance, name, self._decoder.decode(data))

    def _exported(self, number: int, kind: str, name: str) -> object:
        """Returns what calls the test's function of that number, or goes through its iterator."""

        def call(*args: object, **kwargs: object) -> object:
            return self._call_back(number, "call", args, kwargs)

        call.__name__ = call.__qualname__ = name
        return self._exports.setdefault(number, self._iterate(number) if kind == "iterator" else call)

    def _iterate(self, number: int) -> Iterator:
        while True:
            try:
                value = self._call_back(number, "next", (), {})
            except StopIteration:
                return
            yield value

    def _call_back(self, number: int, operation: str, args: tuple, kwargs: dict) -> object:
        """Has the judge do something with an object of the test's, and answers what it asks in the meantime."""
        with self._lock:
            if not self._nonces:
                raise RuntimeError("a function of the test was called after the call that was given it had ended")
            encoded = [self._encoder.encode(arg) for arg in args]
            keywords = {name: self._encoder.encode(arg) for name, arg in kwargs.items()}
            wire.send(self._channel, {"nonce": self._nonces[-1], "call": [number, operation, encoded, keywords]})
            while (message := wire.receive(self._channel)) is not None:
                if "op" in message:
                    self._reply(message)
                elif "raised" in message:
                    raise self._rebuild(message)
                else:
                    return self._arguments(message)[0][0]
            raise SystemExit  # the judge hung up

    def _rebuild(self, message: dict) -> BaseException:
        """Returns an exception of the test's: the judge has it under a number, in case it comes back."""
        cls = next((TYPES[name] for name in message["bases"] if name in TYPES), Exception)
        try:
            error = cls(*self._arguments(message)[0])
        except TypeError:
            error = Exception(message["text"])
        error._raised_by_the_test = message["raised"]
        return error

    # What the judge is sent

    def _handle(self, value: object) -> list:
        cls = type(value)
        if id(cls) not in self._abilities:  # the object keeps the class alive, and so its id unique
            found = (sign for sign, names in _ABILITIES.items() if any(_of(cls, name) is not None for name in names))
            self._abilities[id(cls)] = "".join(found)
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)
        return [number, self._abilities[id(cls)]]

    def _own(self, value: object) -> list | None:
        """Returns a handle for an instance of a builtin type's subclass, its name, and the operators it changes."""
        cls = type(value)
        if value is self._bare:
            return None
        if cls.__bases__ == (tuple,) and cls.__dict__.keys() <= _PLAIN_RECORD | {*cls.__dict__.get("_fields", ())}:
            return None
        base = next(base for base in _mro(cls) if base.__module__ in ("builtins", "collections") and base in BASES)
        changed = [name for name in OVERRIDABLE if _of(cls, f"__{name}__") is not _of(base, f"__{name}__")]
        return [*self._handle(value), _name_of(cls), changed]

    def _reference(self, value: object) -> dict:
        """Returns what stands for an object that is no value."""
        if isinstance(value, types.FunctionType | types.GeneratorType):
            for number, export in self._exports.items():
                if export is value:
                    return {"j": number}
        if issubclass(type(value), type) and issubclass(value, BaseException):
            return self._exception_class(value)
        return {"h": self._handle(value)}

    def _exception_class(self, cls: type) -> dict:
        if TYPES.get(cls.__name__) is cls:
            return {"type": [cls.__name__]}
        if cls not in self._classes:
            self._classes[cls] = len(self._objects)
            self._objects.append(cls)
        bases = [self._exception_class(base) for base in cls.__bases__ if issubclass(base, BaseException)]
        return {"X": [self._classes[cls], _name_of(cls), bases]}

    def _describe(self, error: BaseException, causes: int = _MAX_CAUSES) -> dict:
        cls = type(error)
        described: dict = {"class": self._exception_class(cls), "message": text_of(error)}
        if is_refused_memory(error):
            described["refused_memory"] = True
        number = vars(error).get("_raised_by_the_test")
        if number is not None:
            return described | {"raised": number}
        try:
            described["args"] = [self._encoder.encode(arg) for arg in BaseException.args.__get__(error)]
            found = {name: getattr(error, name) for name in _EXCEPTION_ATTRIBUTES if hasattr(cls, name)}
            attributes = {name: value for name, value in {**found, **vars(error)}.items() if value is not None}
            described["attributes"] = [[name, self._encoder.encode(value)] for name, value in attributes.items()]
        except Exception:  # they cannot be shown; the exception is raised all the same
            described |= {"args": [described["message"]], "attributes": []}
        if TYPES.get(cls.__name__) is not cls:
            self._objects.append(error)
            described["handle"] = len(self._objects) - 1
        if causes and error.__cause__ is not None:
            described["cause"] = self._describe(error.__cause__, causes - 1)
        return described

    def _collect(self, message: object, category: type, filename: str, line: int, *_: object) -> None:
        if len(self._warnings) < _MAX_WARNINGS:
            self._warnings.append((category, text_of(message), line))


class _OfTheTest:
    """Base of the classes that only the test names; what the copy lacks (a method) is asked of the original."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._ask(name)


def _of(cls: type, name: str) -> object:
    """Returns what the class has under that special name, asked without running code of its metaclass."""
    return next((base.__dict__[name] for base in _mro(cls) if name in base.__dict__), None)


def _mro(cls: type) -> tuple[type, ...]:
    return type.__dict__["__mro__"].__get__(cls)


def _name_of(cls: type) -> str:
    return str(type.__dict__["__name__"].__get__(cls))[:200]


def text_of(error: object) -> str:
    """Returns the message of an exception, which may raise one itself."""
    try:
        return str(error)[:MAX_MESSAGE]
    except BaseException as again:
        return f"<its message raised {_name_of(type(again))}>"
