"""What every dataset builder returns: documents of token ids, with labels and optionally the reference's CE."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

IGNORE = -100  # the label of a token that is no target


@dataclass(frozen=True)
class Document:
    """One training example: a prompt, a completion and EOS.

    Attributes:
        tokens: [T] int32 token ids.
        labels: [T] int32, unshifted: ``labels[j]`` is ``tokens[j]``, or -100 where the token is no target (prompt).
        id: names the document in messages.
        reference_ce: [T] float32 CE of each token under the reference model, or None.
    """

    tokens: np.ndarray
    labels: np.ndarray
    id: str
    reference_ce: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens that are no target, which come before those that are."""
        return tuple(self.tokens[self.labels == IGNORE].tolist())


@dataclass(frozen=True)
class Documents:
    """A dataset's documents in a fixed order.

    Attributes:
        name: says what was read, for messages.
        items: at least one document; either all of them carry reference_ce or none does.
        skipped: how many candidates the builder left out, by reason.

    Raises:
        ValueError: no document, or only some of them with reference_ce.
    """

    name: str
    items: tuple[Document, ...]
    skipped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.items:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items() if count)
            raise ValueError(f"{self.name}: the dataset is empty{f' (left out: {reasons})' if reasons else ''}")
        without = [document.id for document in self.items if document.reference_ce is None]
        if 0 < len(without) < len(self.items):
            raise ValueError(
                f"{self.name}: {len(without)} of {len(self.items)} documents have no reference_ce, "
                f"the first is {without[0]}; score all of them or none"
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Document:
        return self.items[index]

    def __iter__(self) -> Iterator[Document]:
        return iter(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every document's length, tokens, labels and reference_ce, in order."""
        digest = hashlib.sha256()
        for document in self.items:
            digest.update(len(document).to_bytes(8, "little"))
            digest.update(document.tokens.astype("<i4").tobytes())
            digest.update(document.labels.astype("<i4").tobytes())
            if document.reference_ce is not None:
                digest.update(document.reference_ce.astype("<f4").tobytes())
        return digest.hexdigest()


def document_from_text(tokenizer, prompt: str, completion: str, id: str) -> Document:
    """Prompt + completion + EOS, where the completion and EOS are the targets.

    Prompt and completion are tokenized apart and joined: no token straddles the split, and a generated completion
    starts exactly where a trained one does. The prompt starts with BOS where the tokenizer's model expects one.
    """
    head = tokenizer.encode_prompt(prompt)
    target = [*tokenizer.encode(completion), tokenizer.eos_id]
    tokens = np.array(head + target, dtype=np.int32)
    labels = tokens.copy()
    labels[: len(head)] = IGNORE
    return Document(tokens, labels, id)
