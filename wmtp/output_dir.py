"""What an output_dir holds already, and whether a run may begin there."""

from collections.abc import Sequence
from pathlib import Path

from wmtp.config import ConfigError
from wmtp.distributed import on_rank_0
from wmtp.errors import is_traceback, keep_tracebacks
from wmtp.storage import Output


def check_output_dir(
    output: Output, what: str, *, results: Sequence[str], overwrite: bool, resume: str | None = None
) -> bool:
    """Whether a folder holds an earlier run of the recipe, which its config.yaml tells: as rank 0 sees it.

    A run that left no result, because it ended in its set-up, is no reason to refuse anything.

    Args:
        output: the folder and, in S3, the names of what is there.
        what: what the recipe makes, with its article, for messages: ``a run``.
        results: names of files and folders that the recipe makes there, beside metrics.jsonl.
        overwrite: replace what is there.
        resume: ``no``, ``yes`` or ``auto``; None for a recipe that cannot resume.

    Raises:
        ConfigError: on every rank: the folder holds other files, or results that would be written over unasked.
    """
    holds = on_rank_0(lambda: _look(output, what, results, overwrite, resume))
    keep_tracebacks(output.folder, resumes=resume is not None)
    return holds


def _look(output: Output, what: str, results: Sequence[str], overwrite: bool, resume: str | None) -> bool:
    folder = output.folder
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    ours = lambda name: not name.endswith(".lock") and not is_traceback(Path(name))
    names = set(filter(ours, here | {*output.remote_names}))
    holds = "config.yaml" in names
    if not holds and names:
        raise ConfigError(
            f"output_dir {folder} holds files that are no {what.split()[-1]}'s; give a new or empty folder"
        )
    found = {n.partition("/")[0] for n in names if _is_result(folder / n, n.split("/"), (*results, "metrics.jsonl"))}
    # What a run wrote at its end, but no state of it: a run that was ended before its first save has neither.
    finished = "checkpoints" in results and not found & {"checkpoints"} and found & {"export", "adapter", "value_model"}
    if found and not overwrite and (resume in (None, "no") or (resume == "auto" and finished)):
        go_on = "" if resume is None or finished else "resume=true to go on with it, "
        lacks = " without a checkpoint to go on from" if finished else ""
        raise ConfigError(
            f"output_dir {folder} already holds {what}{lacks}; set {go_on}overwrite=true to replace it, or another "
            "output_dir"
        )
    return holds


def _is_result(path: Path, parts: Sequence[str], results: Sequence[str]) -> bool:
    """Whether a file is work that was done: not half-written, not empty, and of records one of a step or a sample."""
    if parts[0] not in results or any(part.endswith((".tmp", ".part")) for part in parts):
        return False
    if not path.exists():
        return True  # in S3
    if path.suffix != ".jsonl":
        return path.stat().st_size > 0
    with path.open("rb") as lines:  # what follows the last line end was torn
        whole = (line for line in lines if line.endswith(b"\n"))
        return any(b'"settings":' not in line[:20] and not line.startswith(b'{"step": 0,') for line in whole)
