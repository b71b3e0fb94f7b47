"""The critic's first stage: losses and data of a value model, its accuracy on pairs of programs, and rollouts."""

from wmtp import on_demand
from wmtp.critic.best_weights import BestWeights
from wmtp.critic.evaluate import evaluate_pairs, hidden_states, pair_values
from wmtp.critic.losses import critic_loss
from wmtp.critic.metrics import length_report
from wmtp.critic.pair_dataset import PairDataset, pair_splits
from wmtp.critic.preview import preview_pairs
from wmtp.critic.summary import critic_report

__getattr__ = on_demand(
    __name__,
    differences="near_misses",
    evaluate="score_pairs",
    localise="line_of_tokens",
    losses="mse_loss pairwise_loss response_last response_mean spread_rewards",
    metrics="auc brier expected_calibration_error fit_length_baseline pair_wins probabilities score_report",
    pair_dataset="Pair Pairs balance_lengths encode_pairs split_by_problem",
    pairs="code_contests_pairs condefects_pairs jsonl_pairs packaged_pairs",
)
