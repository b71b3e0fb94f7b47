"""Errors that the user can fix, in one line without secrets, and the end of a process by an error.

A recipe's `main` is decorated with :func:`clear_errors`, and its work runs in :func:`ending`. No error is caught on its
way out, so a debugger stops where it was raised; `sys.excepthook` decides at the end what is printed.
"""

import errno
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
import traceback
from bdb import BdbQuit
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote


class UserError(ValueError):
    """A mistake that the user can fix: one line that names the thing, its value and the way out.

    A recipe prints only that line; every other exception is a fault of code, WMTP's or the user's own, and keeps its
    traceback (:func:`clear_errors`). A component of your own may raise it too.
    """

    exit_status = 1


class Stopped(KeyboardInterrupt):
    """The early end of a run that can be resumed (:mod:`wmtp.training.stopping`), with exit status 75.

    Args:
        text: the last line that is printed.
        agreed: every rank raises it when its own work is done.
    """

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again later

    def __init__(self, text: str, *, agreed: bool = False) -> None:
        super().__init__(text)
        self.agreed = agreed


class MissingError(UserError, FileNotFoundError):
    """A file or folder that does not exist."""


class ExistsError(UserError, FileExistsError):
    """A file or folder that exists and would be overwritten."""


class DiskError(UserError, OSError):
    """A file that could not be written or read: a full disk, a quota, a file system that is gone."""


def hub_hint(name: object) -> str:
    """Returns a hint for a path that does not exist but looks like a name on the Hugging Face hub; else ''."""
    found = re.fullmatch(r"(?:hf://|https://huggingface\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)", str(name))
    if found is None:
        return ""
    return f"; nothing is downloaded: if it is a name on the hub, get it with `hf download {found[1]} --local-dir DIR`"


_OF_THE_DISK = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system or ulimit -f allows",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk or the network file system does not answer",
    errno.ENOTCONN: "the file system is no longer connected",
    errno.ESTALE: "the network file system has lost the file",
}
_OF_A_PATH = {
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
    errno.ELOOP,
}  # fmt: skip
# What torch says of memory, mostly as its OutOfMemoryError, a RuntimeError.
_OF_MEMORY = re.compile("CUDA out of memory|error: out of memory|'out of memory'|_ALLOC_FAILED|DefaultCPUAllocator")
_BY_HAND = (KeyboardInterrupt, BdbQuit)  # Ctrl-C, and a debugger's `q`
_SECONDS_FOR_RANK_0 = 1.0
_WMTP = str(Path(__file__).parent) + os.sep
_LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "<frozen ", "<string>")

_SECRET = re.compile(r"(^|_)(KEY|KEY_ID|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?)$|PASSWORD$", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/\s@:]*:[^/\s@]*(?=@)")
_SHORTEST_SECRET = 8  # shorter values are words: masking them would mangle texts, and no service issues such keys
_MASK = "***"

_output_dir: Path | None = None
_resumes = False
_other_folders: set[Path] = set()  # that this process may write to
_advice: Callable[[], str] = lambda: "recipes/plan_memory.py, given its config, tells what would hold less"


def keep_tracebacks(output_dir: Path, *, resumes: bool) -> None:
    """Sets the run's folder as the place of this process's tracebacks: ``error_rank0.txt``.

    Args:
        resumes: whether the recipe can resume from the folder.
    """
    global _output_dir, _resumes
    _output_dir, _resumes = output_dir, resumes


def advise(advice: Callable[[], str]) -> None:
    """Sets what the line of a run that is out of memory ends with; it is asked for when that happens."""
    global _advice
    _advice = advice


def may_fill(folder: Path) -> Path:
    """Returns a folder, and remembers it as one that a disk error without a path may be about."""
    _other_folders.add(folder)
    return folder


def is_traceback(path: Path) -> bool:
    """Returns whether a file is a traceback of :func:`keep_tracebacks`: a folder with only these holds no run."""
    return re.fullmatch(r"error_rank\d+\.txt", path.name) is not None


@contextmanager
def clear_errors() -> Iterator[None]:
    """Makes the error that ends this process the last thing on the screen, with exit status 1.

    A :class:`UserError`, a full disk or an unreadable file is one line. Every other error is a fault of code (WMTP's, a
    library's, or the user's own) and keeps its traceback. All tracebacks are also written to ``output_dir``, and
    WMTP_TRACEBACK=1 shows them. Under a launcher only the first rank of a node to fail prints, and the launcher repeats
    its line (:mod:`wmtp.training.launcher`). Ctrl-C outside :func:`wmtp.training.stopping.stopping` is one line and
    status 130; a debugger's `q` is one line and status 1.
    """
    before = sys.excepthook
    sys.excepthook = _end
    yield
    sys.excepthook = before


@contextmanager
def ending(cleanup: Callable[[str], None]) -> Iterator[None]:
    """Calls ``cleanup`` with how the work inside ends: FINISHED, KILLED (``_BY_HAND``) or FAILED. Errors pass through.

    An error in the clean-up of a run that has failed is printed and does not hide the first one.
    """
    try:
        yield
    except BaseException as error:
        try:
            _keep(error)  # before the clean-up, which uploads it
            ended = isinstance(error, _BY_HAND) and getattr(error, "exit_status", None) != 1
            cleanup("KILLED" if ended else "FAILED")
        except Exception as another:
            print(f"while the run was ended: {type(another).__name__}: {one_line(another)}", file=sys.stderr)
        raise
    cleanup("FINISHED")


def mask_secrets(text: str) -> str:
    """Returns the text with ``***`` in place of each secret.

    A secret is a value of 8 or more characters of an environment variable named ``*_KEY``, ``*_KEY_ID``, ``*_SECRET``,
    ``*_TOKEN`` or ``*PASSWORD``, plain or percent-encoded, and the ``user:password`` of a URL.
    """
    values = {value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET}
    values |= {quote(value, safe="") for value in values}
    for value in sorted(values, key=len, reverse=True):  # one may contain another
        text = text.replace(value, _MASK)
    return _IN_URL.sub(_MASK, text)


def one_line(error: BaseException) -> str:
    """Returns an error's message on one line, secrets masked; its class if the message is empty."""
    return mask_secrets(" ".join(str(error).split())) or type(error).__name__


@contextmanager
def as_user_error(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds into a UserError, for parts that know none, such as the sandbox."""
    try:
        yield
    except kinds as error:
        raise UserError(one_line(error)) from error


def raised_in(error: BaseException) -> str:
    """Returns the file of the innermost frame in WMTP's or the user's own code; '' if there is none."""
    own = [frame.filename for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    return own[-1] if own else ""


def disk_fault(error: BaseException, *folders: Path) -> str | None:
    """Returns the fault of the disk that caused an error, with path and free bytes; None for other errors.

    Args:
        error: an OSError, or one that torch, safetensors or SQLite raised because of it.
        folders: candidates for errors without a path; by default output_dir, the working folder and those of
            :func:`may_fill`. The one with the least room is named.
    """
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if number == errno.ENOTCONN and not cause.filename:  # type: ignore[attr-defined]
            continue  # of a socket; with a path it is of a file system in user space
        text = str(cause)
        if number is None and (match := re.search(r"\(os error (\d+)\)", text)):  # from safetensors and other Rust code
            number = int(match[1])
        if "database or disk is full" in text:
            number = errno.ENOSPC
        torn = re.search(r"PytorchStreamWriter failed|unexpected pos", text)  # torch.save hides the cause
        said = "a file could not be written whole" if torn else _OF_THE_DISK.get(number or 0)
        if said is not None:
            named = [Path(os.fsdecode(cause.filename))] if isinstance(cause, OSError) and cause.filename else []
            some = [*filter(None, (_output_dir,)), Path.cwd(), *_other_folders]
            free = {path: _free_bytes(path) for path in named or folders or some}
            path = min(free, key=lambda at: free[at])
            return f"{path}: {said} ({free[path] / 1e6:,.1f} MB free)"
    return None


def cannot_be_read(error: Exception, path: str | Path, otherwise: str, doubt: str = "") -> str:
    """Returns one line on a file that cannot be read. Faults of the disk and missing rights have their own way out.

    Args:
        otherwise: the way out of every other fault.
        doubt: the suspected fault of the file's content, left out if its path is at fault.
    """
    lost = isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE)
    if fault := disk_fault(error, *[Path(path)] * lost):  # if not lost, a copy in the cache could not be written
        return f"{fault}; mend that, or {otherwise}"
    why = one_line(error)[:200]
    if isinstance(error, OSError) and error.strerror:
        why, doubt = error.strerror, "" if error.errno in _OF_A_PATH else doubt
    size = f" ({os.path.getsize(path)} bytes)" if doubt and os.path.isfile(path) else ""
    right = "give this user the right to, or " * isinstance(error, PermissionError)
    return f"{path}{size} cannot be read{doubt}: {why}; {right}{otherwise}"


# ----------------------------------------------------------------------------------------------------------------------
# The end of a process


def _end(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Prints an error and ends the process, as a recipe's `sys.excepthook`; even if printing fails."""
    try:
        _log(error)
    except Exception:  # the screen is gone, or str(error) raises
        with suppress(Exception):
            print(_text(error), end="", file=sys.__stderr__, flush=True)
    finally:
        if not (sys.flags.interactive or sys.flags.inspect):
            # A rank that fails alone must not wait for others in a finaliser: the launcher ends them.
            interrupted = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
            os._exit(getattr(error, "exit_status", interrupted))


def _log(error: BaseException) -> None:
    screen = sys.__stderr__ or sys.stderr  # init_process_group's own hook replaces sys.stderr with a buffer
    file, line = _keep(error), line_for_user(error)
    rank = os.environ.get("RANK", "0")
    in_order = isinstance(error, _BY_HAND)
    prefix = "" if in_order else "error: " if rank == "0" else f"error [rank {rank}]: "
    shown = line is None or (os.environ.get("WMTP_TRACEBACK") == "1" and not isinstance(error, Stopped))
    if line is None:
        line = f"{type(error).__name__}: {one_line(error)} (its traceback is above{f' and in {file}' * bool(file)})"
    elif not in_order:
        line += f" (traceback: {file or 'WMTP_TRACEBACK=1'})"
    first = bool(line) and _is_first()
    _reply(f"{prefix}{line}" if first else "")
    if first:
        _end_progress_bars()
        if shown:
            if file:
                print(f"the traceback of rank {rank} is in {file} too", file=screen)
            print(_text(error), end="", file=screen)
        else:
            print(f"{prefix}{line}", file=screen)
    screen.flush()
    sys.stdout.flush()


def line_for_user(error: BaseException) -> str | None:
    """Returns an error's one line for the user; None if they need its traceback."""
    goes_on = _resumes and _output_dir is not None and os.path.exists(_output_dir / "config.yaml")
    resume = f"resume=true goes on from what is complete in {_output_dir}"
    if isinstance(error, Stopped):
        return one_line(error) if str(error) else ""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C"
    if isinstance(error, BdbQuit):
        return "stopped in the debugger"
    if isinstance(error, UserError):
        return one_line(error)
    if isinstance(error, RuntimeError) and re.search(r"Timed out waiting \d+ ?ms", str(error)):  # gloo
        return (
            f"another rank did not come to a collective operation in time ({one_line(error)[-120:]}): see what it said "
            "last; timeout_minutes gives it more time"
        )
    if isinstance(error, RuntimeError) and _OF_MEMORY.search(str(error)):
        said = ". ".join(one_line(error).split(". ")[:2])  # the rest is about the allocator
        return f"{said}; {_advice()}"
    if fault := disk_fault(error):
        return f"{fault}; make room{f', then {resume}' * goes_on}"
    if isinstance(error, OSError) and error.filename is not None and error.errno in _OF_A_PATH:
        return f"{error.filename}: {error.strerror}" if raised_in(error).startswith(_WMTP) else None
    return None


def _text(error: BaseException) -> str:
    return mask_secrets("".join(traceback.format_exception(error)))


def _keep(error: BaseException) -> Path | None:
    """Writes an error's traceback into output_dir, once. Returns the file, or None."""
    kept = getattr(error, "_wmtp_kept", None)
    # A mistake that is found before the run begins writes nothing to disk.
    told_early = isinstance(error, UserError | KeyboardInterrupt)
    if kept or _output_dir is None or isinstance(error, Stopped | BdbQuit):
        return kept
    if told_early and not os.path.exists(_output_dir / "config.yaml"):
        return None
    file = _output_dir / f"error_rank{os.environ.get('RANK', '0')}.txt"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{time.strftime('%Y-%m-%d %H:%M:%S%z')}\n{_text(error)}", encoding="utf-8")
        error._wmtp_kept = file  # type: ignore[attr-defined]
    except (OSError, AttributeError):  # a full disk; an exception without room for a mark
        with suppress(OSError):
            file.unlink()
        return None
    return file


def _is_first() -> bool:
    """Returns whether no other rank of this node has printed. Others wait a moment, so that rank 0 goes first."""
    reply = os.environ.get("TORCHELASTIC_ERROR_FILE")
    spoken = None if reply is None else Path(reply).parents[1] / "wmtp_error"  # of this node's ranks and this attempt
    if os.environ.get("RANK", "0") != "0":
        until = time.monotonic() + _SECONDS_FOR_RANK_0
        while time.monotonic() < until and not (spoken and os.path.exists(spoken)):
            time.sleep(0.05)
    try:
        if spoken is not None:
            spoken.touch(exist_ok=False)
    except OSError as error:
        return not isinstance(error, FileExistsError)
    return True


def _end_progress_bars() -> None:
    """Closes progress bars, which would share a line with the error and be drawn again after it."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


def _reply(line: str) -> None:
    """Passes the line to the launcher in torch's format; `wmtp` is its last line, empty if another rank has one."""
    reply = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if reply is None:
        return
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    with suppress(OSError):
        Path(reply).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}, "wmtp": line}))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, its causes, and those of other ranks (in torch's CheckpointException)."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        found = waiting.pop(0)
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__cause__, found.__context__]
        failures = getattr(found, "failures", None)
        if isinstance(failures, dict):
            waiting += [one[0] for one in failures.values() if isinstance(one, tuple)]


def _free_bytes(path: Path) -> int:
    try:
        there = next(at for at in (path.absolute(), *path.absolute().parents) if os.path.exists(at))
        return shutil.disk_usage(there).free
    except OSError:  # the file system does not answer
        return 0


def _is_library(file: str) -> bool:
    if file.startswith(_WMTP):
        return file.startswith(_WMTP + "sandbox")  # it imports nothing of WMTP, so it raises no UserError
    return file.startswith(_LIBRARIES) or "/site-packages/" in file or "/dist-packages/" in file
