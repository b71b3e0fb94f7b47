"""Stand-ins, in the judge, for objects that live in the program's process.

A trusted test uses a `Remote` like the object itself. What comes back is a fresh builtin value, or, for anything else
(an instance of the program's class, a generator, a function), another `Remote`. Nothing of the program's ever runs in
the judge, and no comparison is ever put to the program: an object that is no value equals nothing.
"""

import builtins
import mmap
import operator
import secrets
from collections.abc import Iterator

from wmtp.sandbox.codec import MALFORMED, Decoder, Encoder
from wmtp.sandbox.supervise import Ended, Process

_CONTROL_FLOW = ("StopIteration", "StopAsyncIteration")  # from a call, they would end the test's own loops early


_SERVED = ("__name__", "__qualname__", "__dict__", "__annotations__")  # special attributes that tests look at


class RemoteError(Exception):
    """An exception of a type that the judge does not have, raised by the program."""


class RemoteExit(BaseException):
    """SystemExit, KeyboardInterrupt and the like, raised by the program inside a call."""


class Unencodable(TypeError):
    """A test hands the program something that cannot be sent, such as a function of its own."""


class Session:
    """Requests to one program, and what became of them.

    Args:
        process: a process in mode `assertion`, already sent its program.
        test_module: `__module__` of classes that the tests themselves define; their instances are sent by attributes.
        flag: one byte, 1 once the program has answered (see `answered`). It may lie in shared memory, so that it can
            be read when an answer has brought the judge down.
    """

    def __init__(self, process: Process, test_module: str, flag: bytearray | mmap.mmap) -> None:
        self.process = process
        self._flag = flag
        self.failure: Ended | None = None  # once set, no test can undo it
        self.waiting = False  # for the program: the time that passes is the program's
        self.raised: BaseException | None = None  # last exception that came from the program
        self.raised_detail = ""
        self.requests = 0
        self._test_module = test_module
        self._instances: list[object] = []
        self._encoder = Encoder(self._reference)
        self._decoder = Decoder(self._resolve)

    @property
    def answered(self) -> bool:
        """Whether the program has given an answer since this was last set to False."""
        return self._flag[0] == 1

    @answered.setter
    def answered(self, value: bool) -> None:
        self._flag[0] = int(value)

    def load(self, program: str, setup: str, entry_point: str | None) -> None:
        """Send the program; raises what its top level raises."""
        self._exchange({"program": program, "setup": setup, "entry_point": entry_point})

    def request(self, operation: str, *args: object, **kwargs: object) -> object:
        """Have `operation` done on the program's side; returns its value or raises its exception.

        Raises:
            Ended: the program broke off, for good.
            Unencodable: an argument cannot be sent.
        """
        if self.failure is not None:
            raise self.failure
        self.requests += 1
        self._instances = []
        message: dict = {"op": operation, "a": [self._encoder.encode(arg) for arg in args]}
        if kwargs:
            message["k"] = {name: self._encoder.encode(arg) for name, arg in kwargs.items()}
        if self._instances:
            message["o"] = self._describe_instances()
        return self._exchange(message)

    def _exchange(self, message: dict) -> object:
        try:
            nonce = secrets.token_hex(8)
            answer = self._await_answer({**message, "nonce": nonce})
            return self._read_answer(answer, nonce, message.get("op"))
        except Ended as end:
            self.failure = end
            raise

    def _await_answer(self, message: dict) -> dict:
        self.waiting = True
        try:
            self.process.send(message)
            answer = self.process.receive()
            self.answered = True
            return answer
        except Ended as end:
            self.failure = end
            raise
        finally:
            self.waiting = False

    def _read_answer(self, answer: dict, nonce: str, operation: str | None) -> object:
        if answer.pop("nonce", None) != nonce or len(answer) != 1:
            raise Ended("violation", "the program sent an answer to what was not asked")
        ((kind, content),) = answer.items()
        if kind == "too_large":
            raise Ended("output_limit", f"the answer takes more than {self.process.limits.output_bytes} bytes")
        try:
            if kind == "error":
                bases = [name for name in content["bases"] if name not in _CONTROL_FLOW or operation == "next"]
                self.raised = rebuild_exception(content["type"], bases, content["message"])
                self.raised_detail = f"{content['type']}: {content['message']}"
            elif kind == "value":
                return self._decoder.decode(content)
            else:
                raise ValueError(f"unknown answer {kind!r}")
        except MALFORMED as error:
            raise Ended("violation", f"the program sent a malformed answer ({type(error).__name__})") from None
        raise self.raised

    def _resolve(self, tag: str, content: list) -> "Remote":
        if tag != "h":
            raise ValueError(f"unknown tag {tag!r}")
        handle, type_name = content
        return Remote(self, {"h": int(handle)}, f"<{type_name!s:.60} object>")

    def _reference(self, value: object) -> dict:
        """What stands for an argument that is no value."""
        if type(value) is Remote:
            return value._remote_reference
        if getattr(type(value), "__module__", None) == self._test_module:
            for index, known in enumerate(self._instances):
                if known is value:
                    return {"o": index}
            self._instances.append(value)
            return {"o": len(self._instances) - 1}
        name = getattr(value, "__name__", None)
        if isinstance(name, str) and getattr(builtins, name, None) is value:
            return {"p": name}
        raise Unencodable(f"a test passes a {type(value).__name__} to the program, which cannot be sent")

    def _describe_instances(self) -> list:
        """Class name and attributes of each instance sent; encoding attributes may add instances to the list."""
        described = []
        for instance in self._instances:
            attributes = [[name, self._encoder.encode(value)] for name, value in vars(instance).items()]
            described.append([type(instance).__name__, attributes])
        return described


def rebuild_exception(type_name: str, bases: list[str], message: str) -> BaseException:
    """The program's exception as one of the judge's: the first builtin base that it names, else `RemoteError`."""
    for name in bases:
        cls = getattr(builtins, name, None)
        if not isinstance(cls, type) or not issubclass(cls, BaseException) or cls in (Exception, BaseException):
            continue
        if not issubclass(cls, Exception):
            return RemoteExit(f"{type_name}: {message}")
        try:
            return cls(message if name == type_name else f"{type_name}: {message}")
        except TypeError:
            continue  # UnicodeDecodeError and ExceptionGroup want more: their base class will do
    return RemoteError(f"{type_name}: {message}")


class Remote:
    """An object of the program's: by name (looked up afresh at each use) or by handle.

    A name that holds a builtin value behaves as that value; as an argument, either kind is the program's object itself.
    """

    __slots__ = ("_remote_label", "_remote_reference", "_remote_session")

    def __init__(self, session: Session, reference: dict, label: str) -> None:
        object.__setattr__(self, "_remote_session", session)
        object.__setattr__(self, "_remote_reference", reference)
        object.__setattr__(self, "_remote_label", label)

    def _remote(self, operation: str, *args: object, **kwargs: object) -> object:
        return self._remote_session.request(operation, self, *args, **kwargs)

    def _remote_value(self) -> object:
        return self if "h" in self._remote_reference else self._remote("get")

    def __call__(self, /, *args: object, **kwargs: object) -> object:
        return self._remote("call", *args, **kwargs)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name.endswith("__") and name not in _SERVED:
            raise AttributeError(name)  # copy, pickle, numpy and others look for protocols
        return self._remote("attr", name)

    def __setattr__(self, name: str, value: object) -> None:
        self._remote("set_attr", name, value)

    def __getitem__(self, key: object) -> object:
        return self._remote("item", key)

    def __setitem__(self, key: object, value: object) -> None:
        self._remote("set_item", key, value)

    def __delitem__(self, key: object) -> None:
        self._remote("delete_item", key)

    def __contains__(self, item: object) -> bool:
        return any(item == other for other in self)  # compared here, not by the program's __eq__

    def __iter__(self) -> Iterator:
        value = self._remote_value()
        if type(value) is not Remote:
            return iter(value)
        iterator = value._remote("iter")
        return iterator if type(iterator) is Remote else iter(iterator)

    def __next__(self) -> object:
        return self._remote("next")

    def __len__(self) -> int:
        return operator.index(self._remote("len"))

    def __bool__(self) -> bool:
        return self._remote("bool") is True

    def __str__(self) -> str:
        return str(self._remote("str"))

    def __repr__(self) -> str:
        return self._remote_label

    def __instancecheck__(self, instance: object) -> bool:
        return self._remote_session.request("is_instance", instance, self) is True

    def __eq__(self, other: object) -> bool:
        value, other = self._remote_value(), other._remote_value() if type(other) is Remote else other
        return False if Remote in (type(value), type(other)) else value == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return id(self)

    def __deepcopy__(self, memo: dict) -> object:
        return self._remote_value()


def _forward(name: str) -> None:
    """Let a name that holds a builtin value take part in the operator `name`, as that value."""

    def apply(self: Remote, *others: object) -> object:
        value = self._remote_value()
        return NotImplemented if type(value) is Remote else getattr(operator, name)(value, *others)

    setattr(Remote, f"__{name.strip('_')}__", apply)


# In an instance the class's own __doc__ would hide the object's.
Remote.__doc__ = property(lambda self: self._remote("attr", "__doc__"))
_OPERATORS = "lt le gt ge add sub mul truediv floordiv mod pow matmul and_ or_ xor neg pos abs invert"
for _name in _OPERATORS.split():
    _forward(_name)
