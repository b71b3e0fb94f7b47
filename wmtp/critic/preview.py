"""The first pairs of a critic's data in the terminal, with the loss's target at each token."""

from typing import Any

import torch

from wmtp.critic.losses import spread_rewards
from wmtp.critic.pair_dataset import PairDataset
from wmtp.report.tokens import token_pieces, token_table


def preview_pairs(count: int, data: PairDataset, tokenizer, spread: str | None = None, **factors: float | None) -> str:
    """Shows the first ``count`` pairs, of two documents each, with the spread reward at each token.

    Args:
        spread, factors: as in :func:`wmtp.critic.losses.spread_rewards`; ``gae`` starts from values of 0, like those of
            a new value head. None, for the loss ``pairwise``, shows the reward at every token of a response.
    """
    tables: list[str] = []
    given = {name: value for name, value in factors.items() if value is not None}
    for row in range(min(count, len(data))):
        batch: dict[str, Any] = data.batch([row])
        response, rewards = batch["response"][0], batch["rewards"][0]  # [2, S], [2]
        values = torch.zeros(response.shape)
        targets, has_target = spread_rewards(spread or "uniform", rewards, response, values, **given)
        for side, document in enumerate(data.documents[row]):
            length, taught = len(document), has_target[side]
            figures = [f"{targets[side, i]:.2f}" if taught[i] else "" for i in range(length)]
            pieces = token_pieces(tokenizer, document.tokens.tolist())
            head = f"preview of {document.id}: {length} tokens, {int(taught.sum())} targets"
            tables.append(f"{head}, each with its reward below it\n{token_table(pieces, {'reward': figures})}")
    return "\n".join(tables)
