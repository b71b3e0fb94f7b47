"""Pairs of programs, in words and as token ids: split by problem, balanced by length, in batches."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from wmtp.data.documents import IGNORE, Document, digest_tokens, document_from_text, left_out
from wmtp.errors import UserError
from wmtp.numerics.keyed import text_hash


@dataclass(frozen=True)
class Pair:
    """Two answers to one problem.

    Attributes:
        problem: the problem's id; pairs are split into training and held-out ones by it.
        prompt: the text before either program, "" for none.
        correct, incorrect: the programs, with LF line ends.
        fault_line: number, from 1, of the wrong line of `incorrect`, where it is known.
        correct_reward, incorrect_reward: targets of the values; 1 and 0 unless rewards were given.
    """

    problem: str
    prompt: str
    correct: str
    incorrect: str
    fault_line: int | None = None
    correct_reward: float = 1.0
    incorrect_reward: float = 0.0


@dataclass(frozen=True)
class Pairs:
    """The pairs of a source in a fixed order.

    Attributes:
        name: names the source in messages.
        items: at least one pair.
        skipped: the number of candidates left out, by reason.
        unread: columns of the source that the builder does not read.

    Raises:
        ValueError: there is no pair.
    """

    name: str
    items: tuple[Pair, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.items:
            raise UserError(f"{self.name}: there is no pair{left_out(self.skipped)}")

    def summary(self) -> str:
        """Describes the pairs in one line: their number, those left out, and columns not read."""
        return f"{self.name}: {len(self)} pairs{left_out(self.skipped, self.unread)}"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Pair:
        return self.items[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.items)

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Returns the problems, each once, in the order of their first pair."""
        return tuple(dict.fromkeys(pair.problem for pair in self.items))


def split_by_problem(pairs: Pairs, fraction: float, part: str = "heldout") -> tuple[Pairs, Pairs]:
    """Splits pairs into (the rest, the part) by a hash of the part's name and the problem's id.

    So all pairs of a problem are on one side, and parts of different names are drawn independently.

    Args:
        fraction: expected share of the problems in the part, in (0, 1).
        part: its name.

    Raises:
        ValueError: a fraction outside (0, 1), or a side without a problem.
    """
    if not 0 < fraction < 1:
        raise UserError(f"{part}_fraction must be in (0, 1), got {fraction!r}")
    taken = {p for p in pairs.problems if text_hash(part, p) / 2**64 < fraction}
    for where, missing, way_out in ((f"in the {part} part", not taken, "raise"), (
        f"outside the {part} part", len(taken) == len(pairs.problems), "lower")):  # fmt: skip
        if missing:
            raise UserError(
                f"{pairs.name}: there is no problem {where}, out of {len(pairs.problems)} at {part}_fraction "
                f"{fraction}; {way_out} it, or give more problems"
            )
    rest, inside = (tuple(p for p in pairs if (p.problem in taken) == side) for side in (False, True))
    return Pairs(pairs.name, rest), Pairs(pairs.name, inside)


@dataclass(frozen=True)
class PairDataset:
    """Tokenized pairs. Axis 1 of an array [P, 2] is the program: 0 the correct one, 1 the incorrect one.

    Attributes:
        name: names the source in messages.
        documents: for each pair the two documents: prompt, program, EOS; program and EOS are the response.
        seq_len: no document is longer.
        skipped: the number of pairs left out, by reason.
    """

    name: str
    pairs: tuple[Pair, ...]
    documents: tuple[tuple[Document, Document], ...]
    pad_id: int
    seq_len: int
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def problems(self) -> np.ndarray:
        """Returns the problem of each pair, [P]."""
        return np.array([pair.problem for pair in self.pairs])

    @cached_property
    def rewards(self) -> np.ndarray:
        """Returns the rewards of both programs, [P, 2] float32."""
        return np.array([(pair.correct_reward, pair.incorrect_reward) for pair in self.pairs], np.float32)

    @property
    def rewards_are_labels(self) -> bool:
        """Returns whether every reward is 1 for the correct and 0 for the incorrect program."""
        return bool((self.rewards == [1, 0]).all())

    @cached_property
    def lengths(self) -> np.ndarray:
        """Counts the tokens of each response, EOS included: [P, 2]."""
        return np.array([[int((d.labels != IGNORE).sum()) for d in both] for both in self.documents])

    @cached_property
    def max_token_id(self) -> int:
        return max(int(d.tokens.max()) for both in self.documents for d in both)

    @cached_property
    def fingerprint(self) -> str:
        """Returns the SHA-256 of tokens, labels, rewards and problems of all pairs, in order."""
        digest = hashlib.sha256()
        for pair, both in zip(self.pairs, self.documents, strict=True):
            digest.update(f"{pair.problem!r} {pair.correct_reward} {pair.incorrect_reward}".encode())
            for document in both:
                digest_tokens(digest, document)
        return digest.hexdigest()

    def take(self, indices: Sequence[int]) -> "PairDataset":
        """Returns the dataset of these pairs, in this order."""
        documents = tuple(self.documents[i] for i in indices)
        return replace(self, pairs=tuple(self.pairs[i] for i in indices), documents=documents)

    def with_rewards(self, rewards: np.ndarray) -> "PairDataset":
        """Returns the same pairs with other rewards, [P, 2]."""
        pairs = (
            replace(pair, correct_reward=float(good), incorrect_reward=float(bad))
            for pair, (good, bad) in zip(self.pairs, rewards, strict=True)
        )
        return replace(self, pairs=tuple(pairs))

    def batch(self, rows: Sequence[int], *, size: int | None = None) -> dict[str, Tensor | list[int]]:
        """Returns the pairs as tensors, padded at the end to the longest document among them.

        Returns:
            tokens [P, 2, S] int64, num_tokens [P, 2] int64 (without padding), response [P, 2, S] bool (where the
            program's tokens and EOS are), rewards [P, 2] float32, and the list `rows`. With `size`, filled up to so
            many pairs that have no response.
        """
        size = len(rows) if size is None else size
        longest = max((len(d) for row in rows for d in self.documents[row]), default=2)
        tokens = torch.full((size, 2, longest), self.pad_id, dtype=torch.int64)
        response = torch.zeros(tokens.shape, dtype=torch.bool)
        rewards, num_tokens = torch.zeros(size, 2), torch.zeros(size, 2, dtype=torch.int64)
        for i, row in enumerate(rows):
            rewards[i] = torch.from_numpy(self.rewards[row])
            for side, document in enumerate(self.documents[row]):
                num_tokens[i, side] = len(document)
                tokens[i, side, : len(document)] = torch.from_numpy(document.tokens)
                response[i, side, : len(document)] = torch.from_numpy(document.labels != IGNORE)
        counted = {"tokens": tokens, "num_tokens": num_tokens}
        return {"rows": list(rows), **counted, "response": response, "rewards": rewards}

    def summary(self) -> str:
        """Describes the data in one line of counts; no document is ever cut."""
        tokens, targets = sum(len(d) for both in self.documents for d in both), self.lengths.sum()
        line = f"{self.name}: {len(self)} pairs of {len(set(self.problems))} problems, {2 * len(self)} documents, "
        line += f"{tokens} tokens, {targets} targets, none cut"
        return line + left_out(self.skipped)


def encode_pairs(tokenizer, pairs: Pairs, *, seq_len: int) -> PairDataset:
    """Tokenizes pairs; a pair with a document of more than seq_len tokens is left out, and counted.

    Raises:
        ValueError: no pair is left.
    """
    if seq_len < 2:
        raise UserError(f"seq_len must be >= 2, got {seq_len}")
    kept, documents = [], []
    for pair in pairs:
        correct = document_from_text(tokenizer, pair.prompt, pair.correct, f"{pair.problem} (correct)")
        both = correct, document_from_text(tokenizer, pair.prompt, pair.incorrect, f"{pair.problem} (incorrect)")
        if max(map(len, both)) <= seq_len:
            kept.append(pair)
            documents.append(both)
    too_long = f"pairs longer than seq_len {seq_len}"
    skipped = {**pairs.skipped, too_long: len(pairs) - len(kept)}
    if not kept:
        raise UserError(f"{pairs.name}: all {len(pairs)} pairs are longer than seq_len {seq_len} tokens; raise seq_len")
    return PairDataset(pairs.name, tuple(kept), tuple(documents), tokenizer.pad_id, seq_len, skipped)


def balance_lengths(dataset: PairDataset, *, seed: int = 0) -> PairDataset:
    """Chooses pairs so that length alone does not tell the correct program.

    Pairs are put into bins of the absolute difference of the two responses' lengths, in tokens (0, 1, 2, 3 to 4, 5 to
    8, ...). Each bin keeps as many pairs with the longer program correct as with the shorter one, so a rule that
    prefers longer (or shorter) programs is right in half of them. Pairs of equal length all stay. The seed and the
    texts alone decide which pairs of the larger side stay.

    Raises:
        ValueError: nothing is left, as all differences have one sign.
    """
    difference = dataset.lengths[:, 0] - dataset.lengths[:, 1]
    size = np.abs(difference)
    bins = np.where(size == 0, -1, np.ceil(np.log2(np.maximum(size, 1))).astype(int))
    hashes = [text_hash(str(seed), pair.problem, pair.correct, pair.incorrect) for pair in dataset.pairs]
    order = sorted(range(len(dataset)), key=hashes.__getitem__)
    room = {b: min(((bins == b) & (difference > 0)).sum(), ((bins == b) & (difference < 0)).sum()) for b in set(bins)}
    used: Counter = Counter()
    kept = []
    for i in order:
        side = (bins[i], difference[i] > 0)
        if difference[i] == 0 or used[side] < room[bins[i]]:
            used[side] += 1
            kept.append(i)
    if not kept:
        longer = "longer" if (difference > 0).any() else "shorter"
        raise UserError(
            f"{dataset.name}: no pair is left after balancing lengths, the correct program is the {longer} one in all "
            f"{len(dataset)}; set balance_lengths to false, or give more pairs"
        )
    skipped = {**dataset.skipped, "pairs left out to balance lengths": len(dataset) - len(kept)}
    return replace(dataset.take(sorted(kept)), skipped=skipped)


def pair_splits(
    tokenizer,
    pairs: Pairs,
    *,
    seq_len: int,
    heldout_fraction: float,
    test_fraction: float | None = None,
    balance: bool = True,
    seed: int = 0,
) -> dict[str, PairDataset]:
    """Splits pairs into ``train``, ``heldout`` and, with a fraction for it, ``test``: disjoint by problem.

    Args:
        seq_len: longest document, in tokens.
        heldout_fraction: share of the problems for early stopping.
        test_fraction: share of the problems for no choice at all; None for no such part.
        balance: balance each part by :func:`balance_lengths`.
        seed: of the balancing, not of the split.

    Raises:
        ValueError: a part without a problem, or without a pair that fits.
    """
    parts = {}
    if test_fraction is not None:
        pairs, parts["test"] = split_by_problem(pairs, test_fraction, "test")
    parts["train"], parts["heldout"] = split_by_problem(pairs, heldout_fraction, "heldout")
    named = {name: replace(part, name=f"{name} part of {part.name}") for name, part in parts.items()}
    encoded = {name: encode_pairs(tokenizer, part, seq_len=seq_len) for name, part in named.items()}
    return {name: balance_lengths(data, seed=seed) if balance else data for name, data in encoded.items()}
