"""Hidden states of a frozen model, kept in one file of a row per token, computed once by all processes together."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from wmtp.distributed import World, gather_objects, wait_for_all


class StateFile:
    """[tokens, D] states in a file that is named by what its content depends on.

    It counts once a note beside it says that it is complete; what a killed process left is written anew.

    Args:
        folder: where the file is, or is to be; shared by all ranks.
        key: names all that the states depend on: the data, the weights, the dtype of their computation.
        num_tokens: rows of the file.
        embed_dim: D.
        dtype: of the stored states.
    """

    def __init__(self, folder: Path, key: str, *, num_tokens: int, embed_dim: int, dtype: torch.dtype) -> None:
        key = f"{key} {embed_dim} {dtype}"
        self._file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.bin"
        self._note = self._file.with_suffix(".json")
        self._tokens, self._dim, self._dtype = num_tokens, embed_dim, dtype
        self._states: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return self._tokens * self._dim * self._dtype.itemsize

    def complete(self) -> bool:
        """Whether an earlier run has written it all."""
        return self._note.exists() and self._file.exists() and self._file.stat().st_size == self.num_bytes

    def complete_for_all(self, world: World | None) -> bool:
        """:meth:`complete`, as every rank sees it."""
        done = self.complete()
        return all(gather_objects(done)) if world is not None and world.size > 1 else done

    @contextmanager
    def written(self, world: World | None) -> Iterator[Callable[[int, Tensor], None]]:
        """Give ``write(start, states [n, D])``; the file is complete when the last rank leaves the block."""
        alone, is_main = world is None or world.size == 1, world is None or world.is_main
        if is_main:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._note.unlink(missing_ok=True)
            with self._file.open("wb") as file:
                file.truncate(self.num_bytes)
        if not alone:
            wait_for_all()
        descriptor = os.open(self._file, os.O_WRONLY)

        def write(start: int, states: Tensor) -> None:
            states = states.to("cpu", self._dtype).contiguous()
            at = int(start) * self._dim * self._dtype.itemsize
            _write_all(descriptor, states.view(torch.uint8).numpy().tobytes(), at)

        try:
            yield write
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not alone:
            wait_for_all()
        if is_main:
            self._note.write_text(json.dumps({"tokens": self._tokens, "embed_dim": self._dim}) + "\n")
        if not alone:
            wait_for_all()

    def read(self, start: int, end: int) -> Tensor:
        """[end - start, D] states, mapped from the file."""
        if self._states is None:
            size = self._tokens * self._dim
            flat = torch.from_file(str(self._file), shared=True, size=size, dtype=self._dtype)
            self._states = flat.view(-1, self._dim)
        return self._states[start:end]


def _write_all(descriptor: int, content: bytes, at: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, at)
        content, at = content[written:], at + written
