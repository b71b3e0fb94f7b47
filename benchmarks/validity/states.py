"""Frozen states of SmolLM2-135M over programs, computed once and kept: what critics of the benchmark are trained on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wmtp.critic.pair_dataset import PairDataset
from wmtp.loss import token_cross_entropy_and_entropy

from .models import smollm2


@dataclass(frozen=True)
class States:
    """Frozen states of every program token (EOS included), one after another: pair by pair, correct then faulty."""

    hidden: dict[int, np.ndarray]  # layer -> [N, D] float16
    ce: np.ndarray  # [N] float32, surprisal under SmolLM2
    entropy: np.ndarray  # [N] float32
    start: np.ndarray  # [P, 2] where each program starts
    length: np.ndarray  # [P, 2]

    def rows(self, pair: int, side: int) -> slice:
        return slice(self.start[pair, side], self.start[pair, side] + self.length[pair, side])


def frozen_states(data: PairDataset, layers: tuple[int, ...], folder: Path) -> States:
    """One forward pass of SmolLM2 over every program, kept in ``folder`` under the data's fingerprint."""
    length = np.array([[len(d) for d in both] for both in data.documents])
    start = (np.cumsum(length) - length.ravel()).reshape(length.shape)
    name = hashlib.sha256(f"{data.fingerprint} {layers}".encode()).hexdigest()[:12]
    path = folder / f"states-{name}"
    if not path.is_dir():
        partial = path.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        _compute_states(data, layers, start, int(length.sum()), partial)
        partial.rename(path)
    hidden = {layer: np.load(path / f"hidden{layer}.npy", mmap_mode="r") for layer in layers}
    return States(hidden, np.load(path / "ce.npy"), np.load(path / "entropy.npy"), start, length)


@torch.no_grad()
def _compute_states(data: PairDataset, layers: tuple[int, ...], start: np.ndarray, total: int, folder: Path) -> None:
    model = smollm2()
    last = len(model.layers)
    seen: dict[int, Tensor] = {}
    for layer in layers:
        if layer < last:
            model.layers[layer - 1].register_forward_hook(lambda _m, _i, out, at=layer: seen.__setitem__(at, out))
    out = {
        layer: np.lib.format.open_memmap(folder / f"hidden{layer}.npy", "w+", np.float16, (total, model.embed_dim))
        for layer in layers
    }
    ce, entropy = np.zeros((2, total), np.float32)
    programs = sorted(((len(d), i, side) for i, both in enumerate(data.documents) for side, d in enumerate(both)))
    for first in range(0, len(programs), 16):  # of nearly equal length
        group = programs[first : first + 16]
        tokens = torch.full((len(group), group[-1][0]), data.pad_id)
        for n, (size, i, side) in enumerate(group):
            tokens[n, :size] = torch.from_numpy(data.documents[i][side].tokens)
        hidden = model.hidden_states(tokens)  # [1, B, S, D]
        labels = tokens.clone()
        for n, (size, _, _) in enumerate(group):
            labels[n, size:] = -100
        both = token_cross_entropy_and_entropy(hidden, model.unembedding, labels)
        seen[last] = hidden[0]
        for n, (size, i, side) in enumerate(group):
            at = slice(start[i, side], start[i, side] + size)
            for layer in layers:
                state = seen[layer][n, :size]
                # Inner states differ in size from token to token by orders of magnitude; the last is normed already.
                scale = 1.0 if layer == last else state.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
                out[layer][at] = (state * scale).half().numpy()
            ce[at], entropy[at] = both[0][0, n, :size].numpy(), both[1][0, n, :size].numpy()
        if first % (16 * 20) == 0:
            print(f"# frozen states: {first} of {len(programs)} programs", flush=True)
    for array in out.values():
        array.flush()
    np.save(folder / "ce.npy", ce)
    np.save(folder / "entropy.npy", entropy)
