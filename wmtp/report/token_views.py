"""Documents cut into tokens with weights and signals of each token, as :func:`wmtp.report.token_weights_html` shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from wmtp.errors import UserError
from wmtp.report.tokens import token_pieces
from wmtp.weighting.targets import valid_targets


@dataclass(frozen=True)
class TokenView:
    """One document, token by token.

    Attributes:
        id: names the document.
        pieces: T token texts, whose concatenation is the document's text. A token that holds only the first bytes of a
            character has an empty one; the token that completes the character has all of it.
        tokens: [T] token ids.
        is_target: [T] bool, True if the token has a loss; the weights of others (prompt, first token) mean nothing.
        weights: method to [T] weights, finite and >= 0 at the targets. At least one method.
        signals: name ("CE", "reference CE", "value", ...) to [T] figures, NaN for none.
        special_ids: token ids to be shown as special tokens rather than as code.

    Raises:
        ValueError: no method, a field that is not [T], or a target's weight that is no finite number >= 0.
    """

    id: str
    pieces: Sequence[str]
    tokens: Sequence[int]
    is_target: Sequence[bool]
    weights: Mapping[str, Sequence[float]]
    signals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    special_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError(f"document {self.id}: weights is empty; give the weights of at least one method")
        fields = {"tokens": self.tokens, "is_target": self.is_target}
        fields |= {f"weights[{name!r}]": values for name, values in self.weights.items()}
        fields |= {f"signals[{name!r}]": values for name, values in self.signals.items()}
        for name, values in fields.items():
            if np.shape(values) != (len(self.pieces),):
                raise ValueError(
                    f"document {self.id}: {name} has shape {np.shape(values)} for {len(self.pieces)} pieces; "
                    "give one value for each token"
                )
        for name in self.weights:
            of_targets = self.target_weights(name)
            wrong = ~(np.isfinite(of_targets) & (of_targets >= 0))
            if wrong.any():
                at = int(np.flatnonzero(np.asarray(self.is_target, dtype=bool))[wrong.argmax()])
                raise UserError(
                    f"document {self.id}: weights[{name!r}] is {of_targets[wrong][0]} at target token {at}; "
                    "a weight is a finite number >= 0"
                )

    def target_weights(self, method: str) -> np.ndarray:
        """Returns the method's weights of the targets: [N] float64."""
        return np.asarray(self.weights[method], dtype=np.float64)[np.asarray(self.is_target, dtype=bool)]


def token_views(
    tokenizer,
    batch: Mapping[str, Tensor],
    weights: Mapping[str, Tensor | None],
    signals: Mapping[str, Tensor] | None = None,
    *,
    ids: Sequence[Sequence[str]],
    limit: int | None = None,
) -> list[TokenView]:
    """Returns the documents of a packed batch, in order, without padding.

    Args:
        batch: tokens and labels [B, S], and document_ids [B, S] (-1 for padding); without document_ids each row is one
            document.
        weights: method to the result of its weighting: [B, S], None (all ones), or [H, B, S], shown as one method for
            each head (a head has weight 0 for targets too near the document's start).
        signals: name to [B, S] figures, shown for targets; values are shown for all tokens.
        ids: the names of each row's documents, as :meth:`wmtp.data.PackedDataset.row_ids` returns them. Rows beyond
            them must be padding.
        limit: maximum number of documents.

    Raises:
        ValueError: shapes or names that do not fit the batch.
    """
    tokens, labels = batch["tokens"], batch["labels"]
    documents = batch.get("document_ids")
    valid = valid_targets(labels, 1, documents)[0].cpu().numpy()
    columns = {name: _column(f"weights[{name!r}]", w, tokens) for name, w in _by_head(weights, tokens).items()}
    figures = {name: _column(f"signals[{name!r}]", s, tokens) for name, s in (signals or {}).items()}
    tokens = tokens.cpu().numpy()
    documents = np.zeros_like(tokens) if documents is None else documents.cpu().numpy()

    views: list[TokenView] = []
    for row in range(len(tokens)):
        inside = documents[row][documents[row] >= 0]
        numbers = inside[np.sort(np.unique(inside, return_index=True)[1])]  # in order of appearance
        names = ids[row] if row < len(ids) else ()
        if len(names) != len(numbers):
            raise ValueError(
                f"row {row} holds {len(numbers)} documents, ids names {len(names)}; give one name for each"
            )
        for number, name in zip(numbers, names, strict=True):
            if limit is not None and len(views) >= limit:
                return views
            here = documents[row] == number
            target = valid[row][here]
            shown = {
                signal: figure[row][here] if signal == "value" else np.where(target, figure[row][here], np.nan)
                for signal, figure in figures.items()
            }
            its_tokens = tokens[row][here].tolist()
            its_weights = {method: column[row][here] for method, column in columns.items()}
            pieces, special = token_pieces(tokenizer, its_tokens), tokenizer.special_ids
            views.append(TokenView(name, pieces, its_tokens, target, its_weights, shown, special))
    return views


def _by_head(weights: Mapping[str, Tensor | None], tokens: Tensor) -> dict[str, Tensor]:
    """Returns [B, S] weights for each method, or for each of its heads if they are [H, B, S]."""
    result = {}
    for name, w in weights.items():
        if w is None:
            result[name] = tokens.new_ones(tokens.shape)
        elif w.ndim == 3:
            result |= {f"{name}, head {head}": of_head for head, of_head in enumerate(w, start=1)}
        else:
            result[name] = w
    return result


def _column(name: str, values: Tensor, tokens: Tensor) -> np.ndarray:
    if values.shape != tokens.shape:
        raise ValueError(f"{name} must be [B, S] = {tuple(tokens.shape)} like the tokens, got {tuple(values.shape)}")
    return values.detach().double().cpu().numpy()
