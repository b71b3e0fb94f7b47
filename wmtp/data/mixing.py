"""Mixtures of several data sets with shares."""

import difflib
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from wmtp.data.documents import IGNORE, Document, Documents, comes_from, state_of
from wmtp.data.rows import is_number
from wmtp.errors import UserError

_MOST = 1000  # times that a document is there
_STOPS = {"first_exhausted": min, "all_exhausted": max}


def _states(arguments: Mapping[str, Any]) -> str | None:
    """Returns what the parts come from, and the code of their builders; None where one of them does not say it."""
    states = {}
    for name, part in arguments["parts"].items():
        if not isinstance(part, partial) or (state := state_of(part.func, part.keywords)) is None:
            return None
        code = hashlib.sha256(Path(inspect.getfile(inspect.unwrap(part.func))).read_bytes()).hexdigest()
        states[name] = [state, code]
    return json.dumps(states)


@comes_from(_states)
def mixture(
    tokenizer,
    *,
    parts: Mapping[str, Callable[..., Documents]],
    shares: Mapping[str, float] | None = None,
    stopping_strategy: str = "first_exhausted",
    seed: int = 0,
) -> Documents:
    """The documents of several data sets, each with its share of the target tokens.

    Documents are taken whole, so a share is met to within one; targets that packing cuts off count too. Parts follow
    each other in the order of their names in the config, each in its own order: training draws rows from all of them in
    each epoch.

    Args:
        parts: name to a section with a `_component_` of its own, any builder of training data.
        shares: name to a number, in proportion to the targets of that part. Null: all documents of all parts, once.
        stopping_strategy: with shares: ``first_exhausted``: no document is there twice, and the mixture is the largest
            that has the shares: one part is there in full, of the others a fixed sample. ``all_exhausted``: every
            document is there, those of the smaller parts several times. (As `datasets.interleave_datasets` calls them.)
        seed: of the samples, >= 0.

    Raises:
        ValueError: shares and parts of other names, a share that is no number > 0, or what a part's builder refuses.
    """
    if stopping_strategy not in _STOPS:
        raise UserError(f"stopping_strategy must be one of {', '.join(_STOPS)}, got {stopping_strategy!r}")
    if seed < 0:
        raise UserError(f"seed must be a whole number >= 0, got {seed!r}")
    if not parts:
        raise UserError("parts must name at least one data set: a name, and a section with a _component_")
    wanted = _checked_shares(parts, shares)
    sets = {name: _built(name, part, tokenizer) for name, part in parts.items()}
    count = lambda document: np.count_nonzero(document.labels[1:] != IGNORE)
    targets = {name: np.array([count(d) for d in documents], np.int64) for name, documents in sets.items()}
    chosen = {name: np.arange(len(documents)) for name, documents in sets.items()}
    if wanted is not None:
        empty = next((name for name, counts in targets.items() if not counts.sum()), None)
        if empty is not None:
            raise UserError(f"parts.{empty}: {sets[empty].name} has no target, so it cannot have a share of them")
        total = _STOPS[stopping_strategy](targets[name].sum() / share for name, share in wanted.items())
        for number, (name, share) in enumerate(wanted.items()):
            times = share * total / targets[name].sum()
            if times > _MOST:
                raise UserError(
                    f"shares.{name}: {sets[name].name} would be there {times:,.0f} times; give it a "
                    "smaller share, or set stopping_strategy to first_exhausted"
                )
            order = np.random.Generator(np.random.PCG64([seed, number])).permutation(len(targets[name]))
            chosen[name] = _drawn(targets[name], share * total, order)
    counts = {name: int(targets[name][chosen[name]].sum()) for name in sets}
    said = ", ".join(
        f"{name} ({len(chosen[name])} of {len(documents)} documents, "
        f"{counts[name] / max(sum(counts.values()), 1):.1%} of the targets)"
        for name, documents in sets.items()
    )
    scored = [documents.scored_len for documents in sets.values() if documents.scored_len is not None]
    return Documents(
        f"mixture of {said}",
        _Mixed(sets, chosen),
        skipped={f"{reason} of {name}": n for name, d in sets.items() for reason, n in d.skipped.items()},
        scored_len=min(scored, default=None),
        unread=tuple(f"{name}.{column}" for name, d in sets.items() for column in d.unread),
        must_read=tuple(sorted({signal for documents in sets.values() for signal in documents.must_read})),
    )


class _Mixed(Sequence[Document]):
    """Documents of several data sets, one set after the other; a document's name begins with that of its set."""

    def __init__(self, sets: Mapping[str, Documents], chosen: Mapping[str, np.ndarray]) -> None:
        self._sets, self._chosen = list(sets.items()), list(chosen.values())
        self._ends = np.cumsum([len(indices) for indices in self._chosen])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Document:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = int(np.searchsorted(self._ends, index, side="right"))
        name, documents = self._sets[at]
        document = documents[int(self._chosen[at][index - self._ends[at]])]  # counted from the set's end
        return replace(document, id=f"{name}/{document.id}")


def _checked_shares(parts: Mapping[str, Any], shares: Mapping[str, float] | None) -> dict[str, float] | None:
    """Returns the shares in the order of the parts, of sum 1."""
    if shares is None:
        return None
    for name in shares.keys() - parts.keys():
        near = difflib.get_close_matches(str(name), map(str, parts), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"shares names {name!r}, which is none of the parts {', '.join(map(str, parts))}{hint}")
    for name in parts:
        if name not in shares:
            raise UserError(f"shares says nothing of the part {name!r}; give it a share, or leave it out of parts")
        if not is_number(shares[name]) or shares[name] <= 0:
            raise UserError(f"shares.{name} must be a number > 0, got {shares[name]!r}; leave a part of none out")
    total = sum(shares.values())
    return {name: shares[name] / total for name in parts}


def _built(name: str, part: object, tokenizer) -> Documents:
    if not callable(part):
        raise UserError(f"parts.{name} must be a section with the _component_ of a builder of data, got {part!r:.60}")
    documents = part(tokenizer)
    if not isinstance(documents, Documents):
        raise UserError(
            f"parts.{name} gives {type(documents).__name__}, not documents in memory or data_cache; name a builder of "
            "training data (without _stream)"
        )
    return documents


def _drawn(targets: np.ndarray, goal: float, order: np.ndarray) -> np.ndarray:
    """Returns indices of documents, in their order, whose targets add up to the goal as nearly as whole ones can.

    They are whole passes over all documents, and of the rest the first ones of ``order``.
    """
    total = int(targets.sum())
    passes, rest = int(goal // total), goal % total
    sums = np.concatenate([[0], np.cumsum(targets[order])])
    nearest = int(np.abs(sums - rest).argmin())
    drawn = [np.arange(len(targets))] * passes + [order[: nearest if passes else max(nearest, 1)]]
    return np.sort(np.concatenate(drawn), kind="stable")
