"""What stands, in the judge, for the exceptions and warnings that the program raises."""

import contextlib
from typing import Any

# From a call, they would end the test's own loops early; `execute` is called by no test.
_FLOW = (StopIteration, StopAsyncIteration, GeneratorExit)
_CONTROL_FLOW: dict[str | None, type | tuple] = {"next": StopIteration, "anext": StopAsyncIteration, "execute": _FLOW}
_NO_ATTRIBUTES = frozenset(dir(BaseException))
_MAX_BASES = 8


class RemoteError(Exception):
    """An exception of the program's whose own class cannot be had in the judge."""


class ProgramsClass(type):
    """Class of the classes that stand for the program's own exceptions: what they do and have is asked of it."""

    _remote_session: Any
    _remote_reference: dict

    def __call__(cls, /, *args: object, **kwargs: object) -> object:
        return cls._remote_session.request("call", cls, *args, **kwargs)

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls._remote_session.request("attr", cls, name)


class _Programs:
    """What the instances of those classes have in common."""

    _remote_session: Any
    _remote_message: str

    def __str__(self) -> str:
        return self._remote_message

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._remote_session.request("attr", self, name)


def exception_class(session: Any, content: list, known: dict[int, type]) -> type:
    """Returns the class that stands for an exception class of the program's: always the same for the same handle."""
    handle, name, bases = content
    if type(handle) is not int or type(name) is not str or len(bases) > _MAX_BASES:
        raise ValueError("an exception class has a handle, a name and base classes")
    if handle not in known:
        classes = [session.decode(base) for base in bases]
        if not classes or not all(isinstance(cls, type) and issubclass(cls, BaseException) for cls in classes):
            raise ValueError("an exception class is derived from exception classes")
        members = {"__module__": "program", "_remote_session": session, "_remote_reference": {"h": handle}}
        mixed = [] if any(issubclass(cls, _Programs) for cls in classes) else [_Programs]
        known[handle] = ProgramsClass(name[:200] or "_", (*mixed, *classes), members)
    return known[handle]


def exception(session: Any, content: dict, operation: str | None) -> BaseException:
    """Returns the exception that the program raised: of the same builtin class, or of one that stands for its own.

    Raises one of `codec.MALFORMED`.
    """
    cls, message = session.decode(content["class"]), content["message"]
    if type(message) is not str or not (isinstance(cls, type) and issubclass(cls, BaseException)):
        raise ValueError("an exception has a class and a message")
    args = [session.decode(arg) for arg in content["args"]]
    if issubclass(cls, _FLOW) and not issubclass(cls, _CONTROL_FLOW.get(operation, ())):
        return RemoteError(f"{cls.__name__}: {message}")
    try:
        error: Any = cls.__new__(cls, *args)
        with contextlib.suppress(TypeError, ValueError):
            builtin: Any = next(base for base in cls.__mro__ if base.__module__ == "builtins")
            builtin.__init__(error, *args)
    except (TypeError, ValueError):  # a group without its exceptions
        return RemoteError(f"{cls.__name__}: {message}")
    if isinstance(cls, ProgramsClass):
        error._remote_message, error._remote_reference = message, {"h": int(content["handle"])}
    for name, data in content["attributes"]:
        if name not in _NO_ATTRIBUTES and not name.startswith("_"):
            value = session.decode(data)
            with contextlib.suppress(TypeError, AttributeError, ValueError):
                setattr(error, name, value)
    if "cause" in content:
        error.__cause__ = exception(session, content["cause"], None)
    return error


def warning(session: Any, content: list) -> tuple:
    """Returns message, class and line of a warning of the program's, as `warnings.warn_explicit` takes them."""
    category, text, line = content
    cls = session.decode(category)
    if not (isinstance(cls, type) and issubclass(cls, Warning)) or type(text) is not str or type(line) is not int:
        raise ValueError("a warning has a class, a message and a line")
    if not isinstance(cls, ProgramsClass):
        return text, cls, line
    message: Any = cls.__new__(cls, text)  # type: ignore[call-overload]
    message._remote_message = text
    return message, cls, line
