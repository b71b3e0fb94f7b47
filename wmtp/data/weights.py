"""Weights that the data carry, of rows, turns, characters and tokens, as one signal of each document.

A token's weight is the product of what is said of it: by its row, its turn, its place in a list or a span, and
``prompt_weight`` if it belongs to the prompt. What nothing is said of counts 1. :func:`wmtp.weighting.given` reads it.

A span's weight belongs to characters. A token has the mean weight of the characters that it holds bytes of: tokens that
share a character's bytes share its weight, and one that lies half inside a span is in the middle.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from wmtp.data.columns import ReadColumns
from wmtp.data.documents import IGNORE, WEIGHT, Document
from wmtp.data.rows import is_number
from wmtp.errors import UserError

_SPAN = ("start", "end", "weight")
_NOT_MEANT = "or give a list; set weight_column or weights_column to null if the data mean something else by it"


@dataclass(frozen=True)
class GivenWeights:
    """The keys of a builder that say where a row's weights are, and what they make of a document.

    Args:
        weight_column: field with a number for all tokens of the row, or a list as in ``weights_column``.
        weights_column: field with a number for each token, or spans ``{start, end, weight}`` over the text that is
            learnt.
        prompt_weight: what a prompt's token counts, in [0, 1]; above 0 prompts are targets.

    Raises:
        ValueError: a prompt_weight out of range.
    """

    weight_column: str | None = "weight"
    weights_column: str | None = "weights"
    prompt_weight: float | None = None

    def __post_init__(self) -> None:
        if self.prompt_weight is not None and not (is_number(self.prompt_weight) and 0 <= self.prompt_weight <= 1):
            raise UserError(
                f"prompt_weight must be in [0, 1], got {self.prompt_weight!r}; null (or 0): prompts are no targets"
            )

    @property
    def must_read(self) -> tuple[str, ...]:
        """Returns the signals without which the labels mean nothing: the weights, where prompts are targets."""
        return (WEIGHT,) if self.prompt_weight else ()

    @property
    def columns(self) -> dict[str, Any]:
        """Returns the fields that rows may have, with the kind of their values, for :class:`ReadColumns`."""
        kinds = {self.weight_column: float, self.weights_column: list}
        return {name: kind for name, kind in kinds.items() if name is not None}

    def require(self, rows: ReadColumns, source: object) -> None:
        """Refuses a column that a config names, and no row of the data has."""
        for key, default in (("weight_column", "weight"), ("weights_column", "weights")):
            if getattr(self, key) not in (None, default):
                rows.require(key, getattr(self, key), source)

    def add(
        self, document: Document, row: Mapping, where: str, learnt: "Callable[[], Learnt] | None" = None
    ) -> Document:
        """Returns the document with the weights of its row.

        Args:
            learnt: gives the text that spans count in; None where the document has none.

        Raises:
            UserError: weights of a wrong kind, number or size; the message names place, column and value.
        """
        return self.finish(document, self.of_row(row, len(document), where, learnt), where)

    def of_row(
        self, row: Mapping, length: int, where: str, learnt: "Callable[[], Learnt] | None" = None
    ) -> np.ndarray | None:
        """Returns the weights [length] that a row's fields say, None where they say nothing; as :meth:`add`."""
        weights: np.ndarray | None = None
        for column in self.columns:
            if row.get(column) is not None:
                found = _of_field(row[column], length, learnt, f"{where}: {column}")
                weights = found if weights is None else weights * found
        return weights

    def finish(self, document: Document, weights: np.ndarray | None, where: str) -> Document:
        """Returns the document with weights [T], None for all 1, and its prompt as targets if it counts.

        Raises:
            UserError: the targets' weights are all 0, or too large for float32.
        """
        labels = document.labels
        if self.prompt_weight:
            # Nothing predicts the first token, which may be BOS.
            prompt = (labels == IGNORE) & (np.arange(len(document)) > 0)
            labels = np.where(prompt, document.tokens, labels)
            weights = np.ones(len(document)) if weights is None else weights
            weights = np.where(prompt, weights * self.prompt_weight, weights)
        if weights is None:
            return document
        with np.errstate(over="ignore"):
            signal = weights.astype(np.float32)
        targets = labels[1:] != IGNORE
        if targets.any() and not signal[1:][targets].any():
            small = " in float32" if weights[1:][targets].any() else ""
            raise UserError(f"{where}: the weights of all {targets.sum()} targets are 0{small}; leave the row out")
        if not np.isfinite(signal).all():
            raise UserError(
                f"{where}: the weights' product {weights.max():g} is too large for float32; make them smaller"
            )
        return replace(document, labels=labels, signals={**document.signals, WEIGHT: signal})


@dataclass(frozen=True)
class Learnt:
    """The text of a document that spans count in.

    Attributes:
        text: a completion, a document, or the content of a turn.
        offsets: the characters [start, end) of each of its tokens, see :meth:`wmtp.pretrained.Tokenizer.offsets`.
        start: the place in the document of its first token.
        name: what messages call it.
    """

    text: str
    offsets: Sequence[tuple[int, int]]
    start: int
    name: str


def number(value: object, what: str, way_out: str = "leave it out for 1") -> float:
    """Returns a weight; the UserError of what is none names it."""
    if not is_number(value) or value < 0:  # type: ignore[operator]
        raise UserError(f"{what} must be a finite number >= 0, got {value!r:.40}; {way_out}")
    return float(value)  # type: ignore[arg-type]


def is_spans(value: object) -> bool:
    """Returns whether a field holds spans, and not a number for each token."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def over_characters(spans: Sequence[object], text: str, what: str, name: str = "text") -> np.ndarray:
    """Returns the weight of each character of a text, 1 outside of all spans: [len(text)] float64.

    Args:
        spans: objects with ``start``, ``end`` (characters of the text, the end not included) and ``weight``.
        name: what messages call the text.

    Raises:
        UserError: a span that is no such object, is empty, leaves the text or overlaps another; a wrong weight.
    """
    weights, taken = np.ones(len(text)), np.zeros(len(text), bool)
    for place, span in enumerate(spans):
        here = f"{what}[{place}]"
        if not isinstance(span, dict):
            raise UserError(f"{here} must be an object with start, end and weight, got {span!r:.40}")
        for key in span.keys() - set(_SPAN):
            near = difflib.get_close_matches(str(key), _SPAN, n=1)
            hint = f"did you mean {near[0]!r}? A" if near else "a"
            raise UserError(f"{here}: nobody reads {key!r}; {hint} span has start, end and weight")
        start: Any = span.get("start")
        end: Any = span.get("end")
        for key, value in (("start", start), ("end", end)):
            if type(value) is not int:
                raise UserError(f"{here}: {key} must be a whole number, got {value!r:.40}; it counts characters from 0")
        if not 0 <= start < end <= len(text):
            raise UserError(
                f"{here}: the span [{start}, {end}) must hold a character and lie within the {name}, which has "
                f"{len(text)}; it counts characters, the end not included"
            )
        if taken[start:end].any():
            raise UserError(
                f"{here}: the span [{start}, {end}) overlaps an earlier one; give each character one weight"
            )
        taken[start:end] = True
        weights[start:end] = number(span.get("weight"), f"{here}: weight")
    return weights


def over_tokens(characters: np.ndarray, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns the mean weight of each token's characters, 1 for a token without any: [len(offsets)] float64."""
    return np.array([characters[start:end].mean() if start < end else 1.0 for start, end in offsets])


def of_tokens(values: Sequence[object], length: int, what: str) -> np.ndarray:
    """Returns a list with a weight for each token: [length] float64."""
    weights = [number(value, f"{what}[{place}]") for place, value in enumerate(values)]
    if len(values) != length:
        raise UserError(
            f"{what} has {len(values)} numbers, the document has {length} tokens (where it has them, BOS "
            "and EOS too); make it with this tokenizer, or give spans of characters"
        )
    return np.array(weights)


def _of_field(value: object, length: int, learnt: Callable[[], Learnt] | None, what: str) -> np.ndarray:
    if not isinstance(value, list):
        return np.full(length, number(value, what, _NOT_MEANT))
    if not value:
        return np.ones(length)
    if not is_spans(value):
        return of_tokens(value, length, what)
    if learnt is None:
        raise UserError(
            f"{what} holds spans of characters, and the row is no text; give a number for each token (of a "
            "conversation: spans as weights of a turn)"
        )
    weights, over = np.ones(length), learnt()
    of_text = over_tokens(over_characters(value, over.text, what, over.name), over.offsets)
    weights[over.start : over.start + len(of_text)] = of_text
    return weights
