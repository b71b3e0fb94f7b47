"""The errors that are for the user: what they can mend, told in one line without secrets. How an error ends a process.

A recipe's `main` is decorated with :func:`clear_errors`, its work stands in :func:`ending`. An error is never caught
on its way out, so that a debugger stops where it was raised; what is printed is decided last, by `sys.excepthook`.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote


class UserError(ValueError):
    """Something that the user can mend: one line that names the thing, its value and the way out.

    A recipe ends with that line alone; every other exception is a fault of code, WMTP's or the user's own, and keeps
    its traceback (:func:`clear_errors`). A component of your own may raise it too.
    """

    exit_status = 1


class Stopped(KeyboardInterrupt):
    """A run ended early and can go on (:mod:`wmtp.training.stopping`): its text is the last line, its exit status 75.

    Args:
        agreed: every rank ends so, when its own work is done.
    """

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again later

    def __init__(self, text: str, *, agreed: bool = False) -> None:
        super().__init__(text)
        self.agreed = agreed


class MissingError(UserError, FileNotFoundError):
    """A file or folder that is not there."""


class ExistsError(UserError, FileExistsError):
    """A file or folder that is there already and would be written over."""


class DiskError(UserError, OSError):
    """A file that the machine did not write or read: a full disk, a quota, a file system that is gone."""


def hub_hint(name: object) -> str:
    """What to add about a path that is not there, where it is a name on the Hugging Face hub; else nothing."""
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
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
_SECONDS_FOR_RANK_0 = 1.0
_WMTP = str(Path(__file__).parent) + os.sep
_LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "<frozen ", "<string>")

_SECRET = re.compile(r"(^|_)(KEY|KEY_ID|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?)$|PASSWORD$", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/\s@:]*:[^/\s@]*(?=@)")
_SHORTEST_SECRET = 8  # a shorter value is a word: to mask it would mangle the text, and no service gives out such a key
_MASK = "***"

_output_dir: Path | None = None
_resumes = False
_other_folders: set[Path] = set()  # that this process may write to


def keep_tracebacks(output_dir: Path, *, resumes: bool) -> None:
    """Tell where this process's tracebacks go: ``error_rank0.txt`` in a folder that is the run's own.

    Args:
        resumes: whether the recipe can go on with what the folder holds.
    """
    global _output_dir, _resumes
    _output_dir, _resumes = output_dir, resumes


def may_fill(folder: Path) -> Path:
    """Returns a folder, which from now on may be the one meant where an error of a full disk names none."""
    _other_folders.add(folder)
    return folder


def is_traceback(path: Path) -> bool:
    """Whether a file of an output_dir is one that :func:`keep_tracebacks` made: no sign of a run."""
    return re.fullmatch(r"error_rank\d+\.txt", path.name) is not None


@contextmanager
def clear_errors() -> Iterator[None]:
    """Let the error that ends this process be the last thing on the screen, and its exit status be 1.

    A :class:`UserError`, and what the machine refused (a full disk, a file that may not be read), is one line. Every
    other error keeps its traceback, as it is the code's: WMTP's, a library's, or what someone has just written. The
    traceback of either kind is in ``output_dir`` too; WMTP_TRACEBACK=1 shows it. Under a launcher one rank of a node
    speaks, the first to fail, and the launcher repeats it (:mod:`wmtp.training.launcher`). Ctrl-C, where no
    :func:`wmtp.training.stopping.stopping` takes it, is one line and status 130.
    """
    before = sys.excepthook
    sys.excepthook = _end
    yield
    sys.excepthook = before


@contextmanager
def ending(cleanup: Callable[[str], None]) -> Iterator[None]:
    """Call ``cleanup`` with how the work inside ended: FINISHED, KILLED (Ctrl-C) or FAILED; the error goes on.

    What goes wrong in the clean-up of a run that has failed is said, and does not hide why it failed.
    """
    try:
        yield
    except BaseException as error:
        try:
            _keep(error)  # before the clean-up, which uploads it
            ended = isinstance(error, KeyboardInterrupt) and getattr(error, "exit_status", None) != 1
            cleanup("KILLED" if ended else "FAILED")
        except Exception as another:
            print(f"while the run was ended: {type(another).__name__}: {one_line(another)}", file=sys.stderr)
        raise
    cleanup("FINISHED")


def mask_secrets(text: str) -> str:
    """Returns the text with ``***`` in the place of each secret.

    A secret is the value, of 8 characters or more, of an environment variable named like one (``*_KEY``, ``*_KEY_ID``,
    ``*_SECRET``, ``*_TOKEN``, ``*PASSWORD``), as it is or percent-encoded, and the ``user:password`` of a URL.
    """
    values = {value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET}
    values |= {quote(value, safe="") for value in values}
    for value in sorted(values, key=len, reverse=True):  # one may hold another
        text = text.replace(value, _MASK)
    return _IN_URL.sub(_MASK, text)


def one_line(error: BaseException) -> str:
    """What an error says, on one line, without secrets; its class where it says nothing."""
    return mask_secrets(" ".join(str(error).split())) or type(error).__name__


@contextmanager
def as_user_error(*kinds: type[Exception]) -> Iterator[None]:
    """Make one line of what a part that knows nothing of users refuses, such as the sandbox."""
    try:
        yield
    except kinds as error:
        raise UserError(one_line(error)) from error


def raised_in(error: BaseException) -> str:
    """The file of the innermost frame that is no library's: it is WMTP's, or the user's own."""
    own = [frame.filename for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    return own[-1] if own else ""


def disk_fault(error: BaseException, *folders: Path) -> str | None:
    """What the disk refused, with path and free bytes, where that is the error's cause; else None.

    Args:
        error: an OSError, or what torch, safetensors or SQLite made of one.
        folders: where it was written, for errors that do not say: by default output_dir, the working folder or one of
            :func:`may_fill`, whichever has the least room.
    """
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if number == errno.ENOTCONN and not cause.filename:  # type: ignore[attr-defined]
            continue  # a socket's; a file system in user space has it too
        text = str(cause)
        if number is None and (match := re.search(r"\(os error (\d+)\)", text)):  # safetensors and other Rust
            number = int(match[1])
        if "database or disk is full" in text:
            number = errno.ENOSPC
        torn = re.search(r"PytorchStreamWriter failed|unexpected pos", text)  # torch.save: not what its writer met
        said = "a file could not be written whole" if torn else _OF_THE_DISK.get(number or 0)
        if said is not None:
            named = [Path(os.fsdecode(cause.filename))] if isinstance(cause, OSError) and cause.filename else []
            some = [*filter(None, (_output_dir,)), Path.cwd(), *_other_folders]
            free = {path: _free_bytes(path) for path in named or folders or some}
            path = min(free, key=lambda at: free[at])
            return f"{path}: {said} ({free[path] / 1e6:,.1f} MB free)"
    return None


def cannot_be_read(error: Exception, path: str | Path, otherwise: str, doubt: str = "") -> str:
    """One line on a file that cannot be read. A fault of the disk, or of rights, has a way out of its own.

    Args:
        otherwise: the way out of every other fault.
        doubt: what may be wrong with the file's bytes, where it is not the path that is at fault.
    """
    lost = isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE)
    if fault := disk_fault(error, *[Path(path)] * lost):  # else it was a copy, in the cache, that could not be written
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
    """What `sys.excepthook` does in a recipe. Whatever goes wrong in it, the process ends."""
    try:
        _say(error)
    except Exception:  # the screen is gone, or the error's own text is an error
        with suppress(Exception):
            print(_text(error), end="", file=sys.__stderr__, flush=True)
    finally:
        if not (sys.flags.interactive or sys.flags.inspect):
            # A rank that fails alone must not wait for its peers in a finaliser: the launcher ends them.
            interrupted = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
            os._exit(getattr(error, "exit_status", interrupted))


def _say(error: BaseException) -> None:
    screen = sys.__stderr__ or sys.stderr  # init_process_group's own hook puts a buffer in the place of sys.stderr
    file, line = _keep(error), line_for_user(error)
    rank = os.environ.get("RANK", "0")
    in_order = isinstance(error, KeyboardInterrupt)
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
    """The one line that an error is for the user; None where its traceback is what they need."""
    goes_on = _resumes and _output_dir is not None and os.path.exists(_output_dir / "config.yaml")
    resume = f"resume=true goes on from what is complete in {_output_dir}"
    if isinstance(error, Stopped):
        return one_line(error) if str(error) else ""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C"
    if isinstance(error, UserError):
        return one_line(error)
    if fault := disk_fault(error):
        return f"{fault}; make room{f', then {resume}' * goes_on}"
    if isinstance(error, OSError) and error.filename is not None and error.errno in _OF_A_PATH:
        return f"{error.filename}: {error.strerror}" if raised_in(error).startswith(_WMTP) else None
    return None


def _text(error: BaseException) -> str:
    return mask_secrets("".join(traceback.format_exception(error)))


def _keep(error: BaseException) -> Path | None:
    """Write an error's traceback into output_dir, once; the file, None where there is none."""
    kept = getattr(error, "_wmtp_kept", None)
    # A mistake that is found before the run begins leaves no trace on disk.
    told_early = isinstance(error, UserError | KeyboardInterrupt)
    if kept or _output_dir is None or isinstance(error, Stopped):
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
    """Whether no other rank of this node has spoken. Rank 0, with the same error a little later, goes first."""
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
    """Leave the line of a progress bar, which would share it with the error, and be drawn again after it."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


def _reply(line: str) -> None:
    """Tell the launcher, in torch's format; `wmtp` is the line that it ends with, empty where another rank's is it."""
    reply = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if reply is None:
        return
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    with suppress(OSError):
        Path(reply).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}, "wmtp": line}))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came of, and what of it other ranks met (torch's CheckpointException)."""
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
    except OSError:  # the one that does not answer
        return 0


def _is_library(file: str) -> bool:
    if file.startswith(_WMTP):
        return file.startswith(_WMTP + "sandbox")  # which stands alone and knows no error of ours
    return file.startswith(_LIBRARIES) or "/site-packages/" in file or "/dist-packages/" in file
