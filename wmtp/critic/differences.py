"""Training data from pairs of programs: the tokens by which a right one differs from its near miss weigh more."""

import math
from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np

from wmtp.critic.pair_dataset import Pair, Pairs, split_by_problem
from wmtp.data.documents import Document, Documents, document_from_text
from wmtp.data.weights import GivenWeights
from wmtp.errors import UserError


def near_misses(
    tokenizer, *, pairs: Pairs, boost: float = 4.0, split: str = "all", heldout_fraction: float = 0.1
) -> Documents:
    """The right programs of pairs, each a document; tokens that a near miss has otherwise weigh ``boost``, all else 1.

    Lines are compared first, and then the tokens of lines that differ (the segments of FGit, arXiv 2503.16913, whose
    weights are not established: the boost is ours). Where the near miss has tokens more, what weighs is the token that
    the right program has in their place, which may be its EOS. A right program with several near misses is one document
    with the mean of its weights. :func:`wmtp.weighting.given` reads them.

        right      return a + b        tokens  return| a| +| b        weights  1 1 boost 1
        near miss  return a - b

    Args:
        pairs: a section that builds pairs, such as :func:`wmtp.critic.condefects_pairs`.
        boost: >= 1.
        split: ``all``; ``train`` or ``heldout``: of problems, as `critic_stage1.py` splits them.
        heldout_fraction: share of the problems in ``heldout``, in (0, 1).

    Raises:
        ValueError: pairs that are none, a value out of range, or a side without a problem.
    """
    if not isinstance(pairs, Pairs):
        raise UserError(
            f"pairs must be a section that builds pairs, such as wmtp.critic.condefects_pairs, got {pairs!r}"
        )
    if isinstance(boost, bool) or not isinstance(boost, int | float) or not 1 <= boost < math.inf:
        raise UserError(f"boost must be a number >= 1, got {boost!r}")
    if split not in ("all", "train", "heldout"):
        raise UserError(f"split must be one of all, train, heldout, got {split!r}")
    chosen = pairs if split == "all" else split_by_problem(pairs, heldout_fraction)[split == "heldout"]
    groups: dict[tuple[str, str, str], list[Pair]] = {}
    for pair in chosen:
        groups.setdefault((pair.problem, pair.prompt, pair.correct), []).append(pair)
    items = tuple(_document(tokenizer, of_one, boost) for of_one in groups.values())
    return Documents(f"right programs of {pairs.name}", items, skipped=dict(pairs.skipped), unread=pairs.unread)


def _document(tokenizer, pairs: Sequence[Pair], boost: float) -> Document:
    [problem, prompt, correct] = pairs[0].problem, pairs[0].prompt, pairs[0].correct
    document = document_from_text(tokenizer, prompt, correct, problem)
    share = np.mean([differing_tokens(tokenizer, correct, pair.incorrect) for pair in pairs], axis=0)
    weights = np.ones(len(document))
    weights[-len(share) :] += (boost - 1) * share
    return GivenWeights().finish(document, weights, problem)


def differing_tokens(tokenizer, right: str, wrong: str) -> np.ndarray:
    """Marks the tokens of a text, and of its EOS behind, where another one parts from it: [T + 1] bool."""
    sides = []
    for text in (right, wrong):
        lines = text.splitlines(keepends=True)
        starts = [start for start, _ in tokenizer.offsets(text)]
        sides.append(
            (lines, tokenizer.encode(text), np.searchsorted(np.cumsum(list(map(len, lines))), starts, "right"))
        )
    (our_lines, ours, our_line), (their_lines, theirs, their_line) = sides
    differs = np.zeros(len(ours) + 1, bool)
    for kind, *ends in SequenceMatcher(None, our_lines, their_lines, autojunk=False).get_opcodes():
        if kind != "equal":
            first, last = np.searchsorted(our_line, ends[:2])
            begin, stop = np.searchsorted(their_line, ends[2:])
            same = SequenceMatcher(None, ours[first:last], theirs[begin:stop], autojunk=False)
            for kind, start, end, *_ in same.get_opcodes():
                if kind != "equal":
                    differs[first + start : first + max(end, start + 1)] = True
    return differs
