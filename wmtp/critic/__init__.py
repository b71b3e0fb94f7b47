"""The critic's first stage: losses and data of a value model, its accuracy on pairs of programs, and fault lines."""

from wmtp import on_demand
from wmtp.critic.best_weights import BestWeights
from wmtp.critic.evaluate import PairScores, evaluate_pairs, hidden_states, pair_values, score_pairs
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
from wmtp.critic.pair_dataset import (
    Pair,
    PairDataset,
    Pairs,
    balance_lengths,
    encode_pairs,
    pair_splits,
    split_by_problem,
)
from wmtp.critic.preview import preview_pairs
from wmtp.critic.summary import critic_report

__getattr__ = on_demand(
    __name__,
    differences="near_misses",
    localise="line_of_tokens value_drop_by_line",
    pairs="code_contests_pairs condefects_pairs jsonl_pairs packaged_pairs",
)
