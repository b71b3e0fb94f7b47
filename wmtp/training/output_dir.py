"""A run's output_dir: this run's alone, and held against what is there already."""

import socket
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from omegaconf import DictConfig

from wmtp.config import ConfigError
from wmtp.distributed import gather_objects, on_rank_0
from wmtp.errors import is_traceback, keep_tracebacks
from wmtp.files import UNFINISHED
from wmtp.storage import Output, StorageError, check_inputs, output_of
from wmtp.storage.lock import Holder
from wmtp.training.run_log import held_out_file


def open_output(output_dir: str, cfg: DictConfig | None = None, *, resume: str | None = None) -> Output:
    """Returns a run's output folder, checked before anything is built, and this run's alone until it is closed.

    Every rank calls it, after the process group is there.

    Args:
        output_dir: a local folder, or ``s3://bucket/prefix``, which is worked on in a folder below the cache. Ranks on
            several nodes need that folder on a file system they share, so $WMTP_CACHE too.
        cfg: the config: every ``s3://`` in it must be readable.
        resume: as :func:`check_output_dir` takes it. Unless ``no`` or None, what a run left in S3 is fetched where this
            machine has none of it or less; else only its files' names.

    Raises:
        StorageError: on every rank, in the same words: no credentials, no bucket, no permission, nothing there; another
            run writes there; or the folder is not the same one for all ranks.
    """
    output = output_of(output_dir)
    rank = dist.get_rank() if dist.is_initialized() else 0

    def prepare() -> tuple[Holder, list[str]]:
        check_inputs(cfg)
        return output.claim(whole=resume not in (None, "no")), output.remote_names

    holder, output.remote_names = on_rank_0(prepare)
    if dist.is_initialized() and dist.get_world_size() > 1:
        seen = gather_objects((rank == 0 or output.join(holder, rank), socket.gethostname()))
        if blind := [f"rank {number} on {host}" for number, (sees, host) in enumerate(seen) if not sees]:
            what, key = (output_dir, "output_dir") if output.remote is None else (output.folder, "WMTP_CACHE")
            raise StorageError(
                f"{what} is not one folder for all processes: {', '.join(blind)} does not see what rank 0 on "
                f"{seen[0][1]} writes; give as {key} an absolute path on a file system that all nodes share"
            )
    return output


def check_output_dir(
    output: Output, what: str, *, results: Sequence[str], overwrite: bool, resume: str | None = None
) -> bool:
    """Returns whether a folder holds an earlier run of the recipe, by its config.yaml: as rank 0 sees it.

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
    """Returns whether a file holds work: it is whole and not empty, and records are of a step or a sample."""
    if parts[0] not in results or any(part.endswith(UNFINISHED) for part in parts):
        return False
    if "/".join(parts) == held_out_file(0):  # nothing had been trained
        return False
    if not path.exists():
        return True  # in S3
    if path.suffix != ".jsonl":
        return path.stat().st_size > 0
    with path.open("rb") as lines:  # what follows the last line end was torn
        whole = (line for line in lines if line.endswith(b"\n"))
        return any(b'"settings":' not in line[:20] and not line.startswith(b'{"step": 0,') for line in whole)
