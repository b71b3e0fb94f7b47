"""Rewards of programs from a reward model: each text is scored once, and a file keeps the score."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from wmtp.critic.pair_dataset import PairDataset
from wmtp.distributed import gather_objects
from wmtp.errors import UserError
from wmtp.files import cache_folder, locked
from wmtp.pretrained import checkpoint_sha256, resolve_checkpoint

_ROUND = 64  # texts of one process between two writes of the file


class HFRewardModel:
    """A `transformers` sequence-classification model that gives texts rewards, with a file of all rewards so far.

    :func:`hf_reward_model` makes it.
    """

    def __init__(self, folder: Path, *, cache: Path, batch_size: int, max_length: int, dtype: torch.dtype) -> None:
        self._folder, self._batch_size, self._max_length, self._dtype = folder, batch_size, max_length, dtype
        computed = str(dtype) if dtype == torch.float32 else f"{dtype}, last layer in float32"
        kind = hashlib.sha256(f"{checkpoint_sha256(folder)} {computed}".encode()).hexdigest()
        self.file = cache / f"{kind[:24]}.jsonl"
        self._model: Any = None
        self._tokenizer: Any = None

    def score(
        self, texts: Sequence[str], names: Sequence[str], device: torch.device | str = "cpu"
    ) -> tuple[np.ndarray, int]:
        """Returns the rewards [N] of texts, and the number computed now. Every rank calls it with the same texts.

        Args:
            texts: prompt and program.
            names: of the texts, in messages.

        Raises:
            ValueError: a text is longer than max_length tokens, or its reward is not finite; the message names it.
        """
        hashes = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts]
        known = self._read()
        first = {key: i for i, key in reversed(list(enumerate(hashes)))}  # a text that comes twice is scored once
        missing = sorted((i for key, i in first.items() if key not in known), key=lambda i: (len(texts[i]), i))
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        gather = gather_objects if dist.is_initialized() else (lambda value: [value])
        gather(None)  # every rank has read the file before it grows
        rounds = range(0, len(missing), _ROUND * size)
        for start in tqdm(rounds, disable=rank != 0 or not missing, desc="rewards", unit="round", leave=False):
            mine = missing[start : start + _ROUND * size][rank::size]
            rewards, problem = {}, None
            try:
                for i, reward in zip(mine, self._rewards([texts[i] for i in mine], device), strict=True):
                    rewards[i] = reward
            except ValueError as error:
                problem = str(error)
            everyone = gather((rewards, problem))
            rewards = {i: reward for part, _ in everyone for i, reward in part.items()}
            bad = [i for i, reward in sorted(rewards.items()) if not math.isfinite(reward)]
            fresh = {hashes[i]: reward for i, reward in rewards.items() if i not in bad}
            if rank == 0:
                self._append(fresh)
            known |= fresh
            problems = [problem for _, problem in everyone if problem is not None]
            problems += [
                f"the reward of {names[i]} is {rewards[i]}; mend the reward model {self._folder}, or leave the problem "
                "out" for i in bad
            ]  # fmt: skip
            if problems:
                raise UserError(problems[0])  # on every rank
        return np.array([known[key] for key in hashes]), len(missing)

    def _rewards(self, texts: list[str], device: torch.device | str) -> Iterator[float]:
        model, tokenizer = self._load(device)
        encoded = [tokenizer(text)["input_ids"] for text in texts]
        for text, ids in zip(texts, encoded, strict=True):
            if len(ids) > self._max_length:
                raise UserError(
                    f"a text of {len(ids)} tokens is longer than the reward model's max_length {self._max_length}: "
                    f"{text[:40]!r}...; raise max_length, or lower seq_len"
                )
        pad = model.config.pad_token_id
        step = 1 if pad is None else self._batch_size  # without a padding token texts cannot share a batch
        with torch.no_grad():
            for start in range(0, len(encoded), step):
                part = encoded[start : start + step]
                longest = max(map(len, part))
                ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in part], device=device)
                mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part], device=device)
                yield from model(input_ids=ids, attention_mask=mask).logits[:, 0].double().tolist()

    def _load(self, device: torch.device | str):
        if self._model is None:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            try:
                model, loading = AutoModelForSequenceClassification.from_pretrained(
                    self._folder, local_files_only=True, dtype=self._dtype, output_loading_info=True
                )
                self._tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
            except Exception as error:  # transformers' errors share no base class
                raise UserError(
                    f"reward model {self._folder} cannot be loaded: {' '.join(str(error).split())}"
                ) from error
            if loading["missing_keys"]:  # transformers fills them with random numbers
                raise UserError(
                    f"reward model {self._folder} lacks {min(loading['missing_keys'])}; give a model that was trained "
                    "to score text"
                )
            if model.config.num_labels != 1:
                raise UserError(
                    f"reward model {self._folder} must give one number (num_labels 1), it has {model.config.num_labels}"
                )
            self._model = _with_float32_reward(model.eval().requires_grad_(False)).to(device)
        return self._model, self._tokenizer

    def _read(self) -> dict[str, float]:
        """Reads the rewards by text hash; a torn line of a killed run is ignored."""
        known = {}
        for number, line in enumerate(self.file.read_bytes().splitlines(True) if self.file.exists() else (), start=1):
            if line.endswith(b"\n"):
                try:
                    row = json.loads(line)
                    known[row["text_sha256"]] = float(row["reward"])
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{self.file}:{number} is no reward that was written there; remove the file, and its rewards "
                        "are computed again"
                    ) from error
        return known

    def _append(self, rewards: dict[str, float]) -> None:
        if not rewards:
            return
        with locked(self.file), self.file.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # a torn line would swallow the one that follows it
            for key, reward in rewards.items():
                file.write(json.dumps({"text_sha256": key, "reward": reward}).encode() + b"\n")


def _with_float32_reward(model: nn.Module) -> nn.Module:
    """Makes the last layer compute in float32: rewards in bfloat16 keep 8 bits, and pairs would tie."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    if not layers:
        raise UserError(f"reward model {type(model).__name__} has no linear layer with one output")
    layers[-1].float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return model


def hf_reward_model(
    path: str,
    *,
    batch_size: int = 8,
    max_length: int = 4096,
    dtype: str = "fp32",
    cache: str | None = None,
) -> HFRewardModel:
    """A reward model of `transformers` from a local folder (AutoModelForSequenceClassification with one output).

    Args:
        path: the model's folder, with its tokenizer.
        batch_size: texts at a time; 1 where the model's config has no pad_token_id.
        max_length: largest number of the model's tokens in a text; a longer text is refused, not cut.
        dtype: of the model's weights and computation: ``fp32`` or ``bf16``; its last layer computes in float32.
        cache: folder of the rewards computed before; None is `rewards` in ``$WMTP_CACHE`` or ``~/.cache/wmtp``. The
            model's hash names the file, the text's hash the reward.

    Raises:
        CheckpointError: no such folder.
        ValueError: a value out of range.
    """
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if dtype not in dtypes:
        raise UserError(f"dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} must be a whole number >= 1, got {value!r}")
    folder = cache_folder() / "rewards" if cache is None else Path(cache).expanduser()
    return HFRewardModel(
        resolve_checkpoint(path), cache=folder, batch_size=batch_size, max_length=max_length, dtype=dtypes[dtype]
    )


def reward_pairs(
    model: HFRewardModel, dataset: PairDataset, device: torch.device | str = "cpu"
) -> tuple[PairDataset, int]:
    """Replaces the pairs' rewards with those of a reward model; returns the number of texts scored now too."""
    texts, names = [], []
    for pair in dataset.pairs:
        for program, kind in ((pair.correct, "correct"), (pair.incorrect, "incorrect")):
            texts.append(pair.prompt + program)
            names.append(f"problem {pair.problem!r} ({kind} program)")
    rewards, scored = model.score(texts, names, device)
    return dataset.with_rewards(rewards.reshape(-1, 2)), scored
