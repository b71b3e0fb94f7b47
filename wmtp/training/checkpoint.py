"""Checkpoints of a run: sharded, asynchronous, visible only when complete.

    <output_dir>/checkpoints/step_00000040/    model and optimizer shards (torch.distributed.checkpoint),
                                               trainer.pt (step, data position, config, RNG of every rank),
                                               manifest.json (size and SHA-256 of every file)
    <output_dir>/checkpoints/latest            the name of the newest complete one

A checkpoint is written to `step_N.tmp`; once every rank's shards are on disk, rank 0 sees to it that all are there,
hashes the files, writes the manifest, syncs, and renames. Whatever is killed at whatever moment leaves complete
checkpoints and a `.tmp` folder that the next run removes.
"""

import random
import re
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils._pytree import tree_map_only

from wmtp.config import ConfigError, config_changes
from wmtp.distributed import gather_objects, on_rank_0, share_out, wait_for_all
from wmtp.errors import DiskError, UserError, disk_fault
from wmtp.files import (
    MANIFEST,
    UNFINISHED,
    publish,
    read_manifest,
    unfinished,
    verify_file,
    write_manifest,
    write_whole,
)
from wmtp.models.load import named_parameters
from wmtp.storage import Output
from wmtp.training.optimizers import load_optimizer_state

TRAINER = "trainer.pt"
_SECONDS_TO_APPEAR = 5.0  # for what another node wrote to be seen here


class Checkpointer:
    """Saves and restores a run's state under ``<output_dir>/checkpoints``.

    Args:
        output_dir: the run's folder, on a file system that all ranks share.
        keep_last: how many complete checkpoints stay; older ones are removed after a newer one is complete.
        trained_only: leave frozen parameters out, where the run can read them again from where they came.
        output: told of each complete checkpoint, so that it is uploaded, and asked before an old one is removed.

    Attributes:
        saved_step: of the newest checkpoint, complete or being written; None where there is none.
    """

    def __init__(
        self, output_dir: Path, *, keep_last: int = 2, trained_only: bool = False, output: Output | None = None
    ) -> None:
        self.folder = output_dir / "checkpoints"
        self._keep_last, self._trained_only = keep_last, trained_only
        self._output = output or Output(output_dir)
        self._is_main = dist.get_rank() == 0
        self.saved_step: int | None = None
        wait_for_all()  # a rank may have taken long to read its model
        # async_save's collectives run in a thread: on the default group they would meet those of the training loop. In
        # them the fastest disk waits for the slowest.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Any = None  # a Future
        self._publishing: Future | None = None

    def remove_torn(self) -> None:
        """Removes, on rank 0 and before training, what a killed run left half-written."""
        for torn in self.folder.glob(f"step_*{UNFINISHED}") if self._is_main else ():
            shutil.rmtree(torn)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, trainer: dict) -> None:
        """Starts saving; returns once the state is copied. Every rank calls it with the same step.

        Args:
            step: optimizer steps done.
            model, optimizer: as trained, FSDP2-sharded.
            trainer: small state of the loop; the RNG states of all ranks are added.
        """
        self.wait()  # at most one save under way: memory holds one copy
        self.saved_step = step
        target = self.folder / f"step_{step:08d}"
        torn = target.with_name(target.name + UNFINISHED)
        rng = gather_objects(_rng_state())
        if self._is_main:
            unfinished(target).mkdir()
            torch.save({**trainer, "step": step, "rng": rng}, torn / TRAINER)
        dist.barrier(group=self._group)
        weights = _weights(model, self._trained_only)
        state: dict[str, Any] = {"model": weights, "optimizer": get_optimizer_state_dict(model, optimizer)}
        if not any(tensor.is_cuda for tensor in state["model"].values()):
            # CPU tensors are shared with the optimizer, which goes on updating them in place.
            state = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), state)
        self._writing = dcp.async_save(state, checkpoint_id=str(torn), process_group=self._group)
        if self._is_main:
            self._publishing = self._publisher.submit(self._publish, self._writing, torn, target)

    def wait(self) -> None:
        """Waits until the save under way, if any, is complete and visible.

        Raises:
            DiskError: it could not be written: a full disk, a quota, a file system that is gone.
        """
        for future in (self._writing, self._publishing):
            if future is not None:
                _result(future, self.folder)
        self._writing = self._publishing = None

    def close(self) -> None:
        self.wait()
        self._publisher.shutdown()

    def _publish(self, writing: Future, torn: Path, target: Path) -> None:
        # Rank 0's future ends after the metadata is written, which happens only when every rank's shards are on disk.
        writing.result()
        publish_shards(torn, target)
        write_whole(self.folder / "latest", target.name)
        self._output.upload(target)
        for old in complete_checkpoints(self.folder)[: -self._keep_last]:
            if self._output.may_remove(old):  # the next save asks again
                shutil.rmtree(old.rename(unfinished(old)))  # at no time half a complete one


def publish_shards(torn: Path, target: Path) -> None:
    """Renames a folder that `torch.distributed.checkpoint` wrote, with a manifest, if it is whole. One rank only.

    Raises:
        UserError: a file that its metadata name is not there, or shorter or longer: another rank's went elsewhere.
    """
    needed: dict[str, int] = {}
    for piece in dcp.FileSystemReader(str(torn)).read_metadata().storage_data.values():
        needed[piece.relative_path] = max(needed.get(piece.relative_path, 0), piece.offset + piece.length)
    until = time.monotonic() + _SECONDS_TO_APPEAR
    while any(_size(torn / name) != size for name, size in needed.items()) and time.monotonic() < until:
        time.sleep(0.1)
    listed = {name: entry["bytes"] for name, entry in write_manifest(torn).items()}
    lost = [name for name, size in sorted(needed.items()) if listed.get(name) != size]
    if lost:
        (torn / MANIFEST).unlink()
        raise UserError(
            f"checkpoint {torn} lacks {', '.join(lost)}, or a part of it, which another process wrote: output_dir must "
            "be on a file system that all processes share; the checkpoint before it stays the newest"
        )
    shutil.rmtree(target, ignore_errors=True)
    publish(torn, target)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _result(future: Future, folder: Path) -> None:
    """Waits for a future; a disk's refusal on any rank becomes one line instead of all their tracebacks."""
    try:
        future.result()
    except BaseException as error:  # torch's CheckpointException is no Exception
        fault = disk_fault(error, folder)
        if fault is None:
            raise
        raise DiskError(
            f"a checkpoint could not be written: {fault}; make room, then resume=true goes on from the newest complete "
            "one"
        ) from error


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and (p / MANIFEST).exists())


def latest_checkpoint(output_dir: Path) -> Path | None:
    """Returns the newest complete checkpoint of a run, or None where it has none.

    Read off the folder rather than off `latest`, which is for people and scripts: it lags by one where a run was killed
    between the two renames.
    """
    complete = complete_checkpoints(output_dir / "checkpoints")
    return complete[-1] if complete else None


def checkpoint_to_resume(output_dir: Path, resume: str) -> Path | None:
    """Returns the checkpoint that a run goes on from, None for a new run: as rank 0 sees it, on every rank.

    Args:
        resume: ``no``, ``yes`` (there must be one) or ``auto``.

    Raises:
        ConfigError: ``yes``, and there is no complete checkpoint.
    """
    if resume == "no":
        return None
    checkpoint = on_rank_0(lambda: latest_checkpoint(output_dir))
    if resume == "yes" and checkpoint is None:
        raise ConfigError(f"resume=true, but {output_dir}/checkpoints holds no complete checkpoint")
    return checkpoint


def verify_together(folder: Path) -> None:
    """Compares every file with the manifest: the ranks share them out, as one would read 81 GB of a 7B run for minutes.

    Raises:
        UserError: on every rank, as :func:`wmtp.files.verify_manifest` does on one.
    """
    files = list(on_rank_0(lambda: read_manifest(folder)).items())
    share_out(files, lambda file: verify_file(folder, *file))


def load_trainer(checkpoint: Path, cfg: DictConfig) -> tuple[dict, str]:
    """Reads the loop's state, after every file of the checkpoint was held against its manifest, each by one rank.

    Returns:
        The state, and what the config says otherwise than the checkpoint's (:func:`wmtp.config.config_changes`).

    Raises:
        UserError: a file is not the manifest's.
    """
    verify_together(checkpoint)
    state = torch.load(checkpoint / TRAINER, weights_only=False, map_location="cpu")
    return state, config_changes(state.get("config"), cfg)


def load_sharded(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    trained_only: bool = False,
    changes: str = "",
) -> None:
    """Reads weights and the optimizer's moments in place, each rank its shards, saved at whatever world size.

    The optimizer's hyperparameters stay those of the config.

    Args:
        trained_only: as the checkpoint was saved: frozen parameters stay what they are.
        changes: what the config says otherwise than the checkpoint's (:func:`wmtp.config.config_changes`).

    Raises:
        UserError: the checkpoint's parameters are not this model's, or their state not this optimizer's.
    """
    weights = _weights(model, trained_only)
    saved = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    for name, tensor in weights.items():
        found = getattr(saved.get(f"model.{name}"), "size", None)
        if found is None or tuple(found) != tuple(tensor.shape):
            raise UserError(
                f"cannot resume{changes}: checkpoint {checkpoint} holds {name} as "
                f"{tuple(found) if found else 'nothing'}, the model has {tuple(tensor.shape)}; resume with the model "
                "section the run was started with"
            )
    load_optimizer_state(str(checkpoint), saved, model, optimizer, changes=changes)
    dcp.load({"model": weights}, checkpoint_id=str(checkpoint))


def restore_rng(states: list[dict], rank: int) -> None:
    """Continues this rank's random streams; a rank that did not exist then keeps its seeded ones."""
    if rank >= len(states):
        return
    state = states[rank]
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _weights(model: nn.Module, trained_only: bool) -> dict[str, torch.Tensor]:
    weights = model.state_dict()
    if trained_only:
        for name, parameter in named_parameters(model):
            if not parameter.requires_grad:
                weights.pop(name, None)
    return weights


def _rng_state() -> dict:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
