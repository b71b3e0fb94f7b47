"""The judge's conversation with one program: requests, answers, what it raises, the tests' functions that it calls."""

import builtins
import itertools
import operator
import secrets
import sys
import warnings
from collections.abc import Iterator

from wmtp.sandbox import wire
from wmtp.sandbox.codec import IMMUTABLE, MALFORMED, Decoder, Encoder, Unsendable
from wmtp.sandbox.jobs import Verdict
from wmtp.sandbox.operations import OVERRIDABLE
from wmtp.sandbox.raised import ProgramsClass, exception, exception_class, warning
from wmtp.sandbox.remote import ABILITIES, CONTAINERS, CONVERSIONS, Name, Own, remote_class, value_class
from wmtp.sandbox.supervise import ANSWERED, Failure, Process, described

# Requests that change nothing, unless a program's class is odd: what was seen of its objects stays as it is.
_LOOKS = {"get", "data", "items", "len", "bool", "str", "repr", "format", "hash", "type", "signature"}
_LOOKS |= {"has_instance", "has_subclass", *CONVERSIONS}
_WALKS = {"iter", "next"}
_MAX_WALK = 10_000  # items that are kept, to be held against the next walk
_END = object()  # of a walk
TEST_MODULE = "tests"  # of the classes that the tests define, whose instances are sent by their attributes
_MAX_TEXT = 500  # characters of what a function of the test raises
_MAX_NAME = 200  # characters of a class's name: made classes are kept, and the next programs have the same judge
_NAMED_MODULES = sys.stdlib_module_names | {"numpy"}


class Session:
    """Requests to one program, and what became of them.

    Args:
        process: one that serves requests.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self.failure: Failure | None = None  # once set, no test can undo it
        self.passed = 0  # tests
        self.waiting = False  # for the program: the time that passes is the program's
        self.raised: BaseException | None = None  # last exception that came from the program
        self.raised_as = Failure("exception", "")  # what that is, where a test lets it through
        self.remarks: dict[str, None] = {}  # what may be why a test fails, once each
        self.requests = 0
        self.epoch: int = 0  # of the program's state: how often it may have changed
        self._walks: dict[int, list[bytes]] = {}  # by handle: what an object without a length has yielded
        self._instances = _Numbered()
        self._exports = _Numbered()  # what the program may call, go through or ask for an attribute
        self._thrown: list[BaseException] = []  # exceptions of those, by number
        self._classes: dict[int, type] = {}  # that stand for the program's exception classes
        self._encoder = Encoder(self._reference, own=self._own)
        self._decoder = Decoder(self._resolve)
        self.decode = self._decoder.decode

    @property
    def answered(self) -> bool:
        """Returns whether a byte of an answer has come since the flag was last cleared."""
        return bool(self.process.flag[0] & ANSWERED)

    def name(self, expression: str) -> Name:
        """Returns the stand-in for the program's object of that name."""
        return Name(self, {"@": expression}, "in")

    def stop(self, verdict: Verdict, detail: str) -> Failure:
        """Fixes the verdict; returns the exception to raise, which no test can undo."""
        self.failure = self.failure or Failure(verdict, detail)
        return self.failure

    def refuse(self, reason: str) -> Failure:
        """Does the same for what cannot be judged from outside: ours, unless the program's answers have led to it."""
        return self.stop("wrong_answer" if self.answered else "harness_error", f"a test {reason}")

    def remark(self, text: str) -> None:
        """Keeps what may be the reason why a test is going to fail."""
        self.remarks[text] = None

    def request(self, operation: str, /, *args: object, **kwargs: object) -> object:
        """Has `operation` done on the program's side; returns its value or raises its exception.

        Raises:
            Failure: the program broke off, or something cannot be sent; for good.
        """
        if self.failure is not None:
            raise self.failure
        self.requests += 1
        if operation not in _LOOKS:
            self.epoch += 1
            if operation not in _WALKS:
                self._walks = {}
        return self._exchange({"op": operation, **self._arguments(args, kwargs)})

    def walked(self, reference: dict, items: Iterator) -> Iterator:
        """Passes on the items of an object that has no length: the same ones each time, unless the test did something.

        Else `all(v < 9 for v in f(x)) and len(list(f(x))) == 3` would be true of one that is empty at first.
        """
        walks, key, seen = self._walks, reference["h"], []
        for item in itertools.chain(items, [_END]):
            shown = b"" if item is _END else self.shown(item)
            known = walks.get(key, ()) if walks is self._walks else ()
            if len(seen) < len(known) and known[len(seen)] != shown:
                raise self.stop("wrong_answer", "an object of the program's own yields other items each time")
            if len(seen) <= _MAX_WALK:
                seen.append(shown)
            if item is not _END:
                yield item
        if walks is self._walks and len(seen) <= _MAX_WALK:
            walks[key] = seen

    def shown(self, value: object) -> bytes:
        """Returns an answer as it looks on the wire, where the same is the same, an object of the program's too."""
        return wire.frame(self._encoder.encode(value))

    def _arguments(self, args: tuple, kwargs: dict) -> dict:
        self._instances = _Numbered()
        try:
            message: dict = {"a": [self._encoder.encode(arg) for arg in args]}
            if kwargs:
                message["k"] = {name: self._encoder.encode(arg) for name, arg in kwargs.items()}
            if self._instances.entries:
                message["o"] = self._describe_instances()
        except Unsendable as error:
            raise self.refuse(f"passes to the program a value that {error}") from None
        return message

    def _exchange(self, message: dict) -> object:
        nonce = secrets.token_hex(8)
        try:
            self.process.send({**message, "nonce": nonce})
            while True:
                self.waiting = True
                try:
                    answer = self.process.receive()
                finally:
                    self.waiting = False
                if answer.pop("nonce", None) != nonce:
                    raise Failure("violation", "the program sent an answer to what was not asked")
                if "call" not in answer:
                    return self._read_answer(answer, message.get("op"))
                self.process.send({**self._serve_call(answer), "nonce": nonce})
        except Failure as failure:
            self.failure = self.failure or failure
            raise self.failure from None
        except MemoryError as error:
            if error is self.raised:  # by the program, which a test may expect
                raise
            raise self.stop("memory", "the judge ran out of memory on the program's answer") from None

    def _read_answer(self, answer: dict, operation: str | None) -> object:
        try:
            issued = [warning(self, content) for content in answer.pop("warnings", [])]
            ((kind, content),) = answer.items()
            if kind == "unsendable":
                raise Failure("output_limit", f"the answer {content}")
            value = self.decode(content) if kind == "value" else None
            classes = value if type(value) is tuple else (value,)
            if operation != "type" and any(map(_takes_failures, classes)):
                raise Failure("wrong_answer", "to catch this exception of the program's is to catch failed assertions")
            if kind == "error":
                number = content.get("raised")  # of an exception of the test's own
                self.raised = exception(self, content, operation) if number is None else self._thrown[int(number)]
                text = f"{type(self.raised).__name__}: {content['message']}".removesuffix(": ")
                refused = content.get("refused_memory") is True and number is None
                self.raised_as = Failure.raised(text, refused, self.process.limits)
            elif kind != "value":
                raise ValueError(f"unknown answer {kind!r}")
        except MALFORMED as error:
            raise Failure("violation", f"the program sent a malformed answer ({type(error).__name__})") from None
        if self._decoder.disordered:
            self.remark("a set's items could not be put in the program's order")
        for text, category, line in issued:  # where the tests' own filters and recorders are
            warnings.warn_explicit(text, category, "program.py", line, module="__main__")
        if kind == "error":
            raise self.raised
        return value

    def _serve_call(self, answer: dict) -> dict:
        """Does what the program asks of an object that a test has handed to it; the reply may be an exception."""
        try:
            number, operation, args, kwargs = answer["call"]
            target, kind = self._exports.get(number)
            values = [self.decode(arg) for arg in args]
            keywords = {name: self.decode(arg) for name, arg in kwargs.items()}
            action = _ACTIONS[operation, kind]
        except MALFORMED as error:
            raise Failure("violation", f"the program made a malformed call ({type(error).__name__})") from None
        self.epoch += 1
        try:
            return self._arguments((action(target, *values, **keywords),), {})
        except Exception as error:
            if isinstance(error, AssertionError) and error is not self.raised:
                raise self.stop("wrong_answer", f"in a function of the test: {described(error)}") from None
            self._thrown.append(error)
            bases = [base.__name__ for base in type(error).__mro__ if getattr(builtins, base.__name__, None) is base]
            reply = {"raised": len(self._thrown) - 1, "bases": bases, "text": described(error)[:_MAX_TEXT]}
            plain = [arg for arg in error.args if type(arg) in (str, int, float, bool, type(None))]
            return reply | self._arguments(tuple(plain if len(plain) == len(error.args) else [str(error)]), {})

    def _resolve(self, tag: str, content: list) -> object:
        """Returns what an answer refers to: an object or exception class of the program's, a function of the test's."""
        if tag == "j":
            return self._exports.get(content)[0]
        if tag == "X":
            return exception_class(self, content, self._classes)
        if tag != "h":
            raise ValueError(f"unknown tag {tag!r}")
        handle, abilities, *rest = content
        reference, cls = {"h": int(handle)}, remote_class("".join(sorted(ABILITIES.intersection(abilities))))
        if not rest:
            return cls(self, reference, abilities)
        name, changed, data = rest
        value, operators = self.decode(data), OVERRIDABLE.intersection(map(str, changed))
        base = type(value)
        if base in CONTAINERS:
            return cls(self, reference, abilities, base, operators, value)
        kind = next((kind for kind in IMMUTABLE if issubclass(base, kind)), None)
        if kind is None or type(name) is not str:
            raise ValueError("no value of a class that can have subclasses")
        made = kind.__new__(value_class(base, name[:_MAX_NAME], operators), value)
        made.__dict__.update(_remote_session=self, _remote_reference=reference)
        return made

    @staticmethod
    def _own(value: object) -> dict | None:
        return value._remote_reference if issubclass(type(value), Own) else None

    def _reference(self, value: object) -> dict:
        """Returns what stands for an argument that is no value."""
        cls = type(value)
        if issubclass(cls, Own | ProgramsClass) or issubclass(type(cls), ProgramsClass):
            return value._remote_reference
        if getattr(cls, "__module__", None) == TEST_MODULE and not issubclass(cls, type):
            return {"o": self._instances.number(value)}
        if path := _library_path(value):
            return {"p": path}
        if issubclass(cls, Iterator):
            return {"j": [self._exports.number(value, "iterator"), "iterator", ""]}
        if callable(value):
            name = getattr(value, "__name__", None)
            name = name if type(name) is str else cls.__name__
            return {"j": [self._exports.number(value, "function"), "function", name]}
        raise self.refuse(f"passes a {cls.__name__} to the program, which cannot be sent")

    def _describe_instances(self) -> list:
        """Returns class name, attributes and number of each instance sent; encoding attributes may add to the list."""
        described = []
        for instance, _ in self._instances.entries:
            attributes = [[name, self._encoder.encode(value)] for name, value in vars(instance).items()]
            described.append([type(instance).__name__, attributes, self._exports.number(instance, "instance")])
        return described


class _Numbered:
    """Objects, each with a kind, and the numbers that the program knows them by."""

    def __init__(self) -> None:
        self.entries: list[tuple[object, str]] = []
        self._numbers: dict[int, int] = {}  # by id, which nothing else gets while the object is held

    def number(self, value: object, kind: str = "") -> int:
        number = self._numbers.setdefault(id(value), len(self.entries))
        if number == len(self.entries):
            self.entries.append((value, kind))
        return number

    def get(self, number: object) -> tuple[object, str]:
        return self.entries[range(len(self.entries))[number]]


def _attribute(instance: object, name: str) -> object:
    if name.startswith("_"):  # what a test is made of is nobody's business
        raise AttributeError(name)
    return getattr(instance, name)


_ACTIONS = {("call", "function"): operator.call, ("next", "iterator"): next, ("attr", "instance"): _attribute}


def _takes_failures(value: object) -> bool:
    """Whether it is a class that a failed assertion of the tests is an instance of."""
    return isinstance(value, type) and issubclass(value, BaseException) and issubclass(AssertionError, value)


def _library_path(value: object) -> str | None:
    """Returns where the program's side finds the same function, class or module of the library: "operator:add"."""
    owner = getattr(value, "__objclass__", value)
    module = getattr(owner, "__module__", None) or ("numpy" if type(value).__module__ == "numpy" else "builtins")
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if type(value) is type(sys):
        module, name = value.__name__, ""
    if type(module) is not str or type(name) is not str or module.partition(".")[0] not in _NAMED_MODULES:
        return None
    try:
        found = operator.attrgetter(name)(sys.modules[module]) if name else sys.modules[module]
    except (AttributeError, KeyError):
        return None
    return f"{module}:{name}" if found is value else None
