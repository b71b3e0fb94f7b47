"""The critic's first stage: losses that teach a value model, how well it tells programs apart, where a value falls."""

from wmtp.critic.best_weights import BestWeights
from wmtp.critic.localise import line_of_tokens, value_drop_by_line
from wmtp.critic.losses import (
    ValueLoss,
    critic_loss,
    mse_loss,
    pairwise_loss,
    response_last,
    response_mean,
    spread_rewards,
)
from wmtp.critic.metrics import (
    auc,
    brier,
    expected_calibration_error,
    fit_length_baseline,
    length_report,
    length_scores,
    pair_wins,
    probabilities,
    score_report,
)
from wmtp.critic.report import critic_report
from wmtp.critic.scoring import PairScores, evaluate_pairs, pair_values, score_pairs

__all__ = [
    "BestWeights",
    "PairScores",
    "ValueLoss",
    "auc",
    "brier",
    "critic_loss",
    "critic_report",
    "evaluate_pairs",
    "expected_calibration_error",
    "fit_length_baseline",
    "length_report",
    "length_scores",
    "line_of_tokens",
    "mse_loss",
    "pair_values",
    "pair_wins",
    "pairwise_loss",
    "probabilities",
    "response_last",
    "response_mean",
    "score_pairs",
    "score_report",
    "spread_rewards",
    "value_drop_by_line",
]
