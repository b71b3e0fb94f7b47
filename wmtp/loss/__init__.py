"""The multi-token loss: fused, token-weighted, with hard or soft targets for the extra heads."""

from wmtp.loss.anchor import Anchor, AnchorStates
from wmtp.loss.fused import (
    MTPLoss,
    head_weight_tensor,
    token_cross_entropy,
    token_cross_entropy_and_entropy,
    weighted_mtp_cross_entropy,
)
from wmtp.loss.heads import HeadTraining
from wmtp.loss.multi_token import mtp_loss, top_tokens
from wmtp.loss.reference import ReferenceReading
from wmtp.loss.soft_targets import SoftTargets, TopTokens
from wmtp.loss.target_logits import HeadScores, of_each_target, score_heads
