"""Operations of an optimizer step, counted by torch on tensors without data: what equal compute means in a study."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchtune.modules.peft import disable_adapter

from wmtp.config import build
from wmtp.loss import HeadTraining, ReferenceReading
from wmtp.models.value import load_value_model
from wmtp.numerics.fork import scaled_gradient
from wmtp.pretrained import resolve_checkpoint
from wmtp.weighting.base import OF_THE_POLICY, AnyWeighting, Signals, any_weighting

_SAMPLE = 4096  # targets of the sample that tells how many a weighting leaves out


def flops_per_step(cfg: DictConfig) -> float:
    """Counts the floating-point operations of one process's optimizer step of a training config.

    A step of the config's models runs on the meta device, which knows shapes and no numbers, so 7B takes seconds and no
    memory. Counted are forward and backward of the policy with its frozen parts, the unembedding's products as
    :func:`wmtp.loss.mtp_loss` makes them (a first pass for weights that read the policy, no gradient for a target of
    weight zero, what `heads` and `anchor` add and save), and the frozen models beside it. Not counted: what activation
    checkpointing computes again, and what is not a product of matrices. Every position counts as a target.

    Args:
        cfg: of `full_finetune_distributed_wmtp.py` or `lora_wmtp.py`.

    Raises:
        ConfigError, UserError: a model, adapter or weighting that cannot be built.
    """
    weighting = any_weighting(build(cfg.weighting, where="weighting"))
    weighting.rehearse()
    heads = build(cfg.get("heads"), where="heads") or HeadTraining()
    with torch.device("meta"):
        policy = build(cfg.model, where="model")
        if cfg.get("adapters") is not None:
            build(cfg.adapters, policy, where="adapters", seed=0)
    policy.attention = "sdpa"  # flex attention needs CUDA
    heads.prepare(policy.num_future_tokens, cfg.get("head_weights"), "meta", model=policy)
    options = heads.at(0)
    factors = options.get("trunk_gradient", (1.0,) * policy.num_future_tokens)
    anchor, adapted = build(cfg.get("anchor"), where="anchor"), cfg.get("adapters") is not None
    loss = _loss(weighting, factors, teacher=heads.teacher, anchored=anchor is not None)
    frozen: list[tuple[Any, dict]] = []
    scores = ReferenceReading(weighting.needs, heads.soft_targets).asked
    if (scores or (anchor is not None and not adapted)) and cfg.get("reference_model") is not None:
        with torch.device("meta"):
            reference = build(cfg.reference_model, where="reference_model")
        reference.attention = "sdpa"
        frozen.append((reference, {"num_heads": 1, "loss_fn": _forward if scores else _states}))
    if "values" in weighting.needs and cfg.get("value_model") is not None:
        frozen.append((load_value_model(resolve_checkpoint(cfg.value_model)).to("meta"), {}))

    rows = cfg.get("tokens_per_step") or cfg.batch_size * (cfg.get("gradient_accumulation_steps") or 1) * cfg.seq_len
    rows = rows / cfg.seq_len
    tokens = torch.zeros((1, cfg.seq_len), dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        policy(tokens, loss_fn=loss, trunk_gradient=factors).backward()
        with torch.no_grad():
            for model, options in frozen:
                model(tokens, **options)
            if anchor is not None and adapted:
                with disable_adapter(policy):
                    policy(tokens, num_heads=1, loss_fn=_states)
    return counter.get_total_flops() * rows


def _loss(
    weighting: AnyWeighting, factors: Sequence[float], teacher: str | None = None, anchored: bool = False
) -> Callable[..., Tensor]:
    """Returns a `loss_fn` that makes the products of the fused loss, on all positions.

    Args:
        factors: of each head's gradient in the unembedding.
        teacher: whose distributions are soft targets, if any are.
        anchored: whether head 1 has an anchor, whose logits are those of its states.
    """
    heads = len(factors)
    kept = kept_share(weighting, heads)
    of_policy = bool(weighting.needs.intersection(OF_THE_POLICY))
    first_pass = heads if of_policy and weighting.per_head else int(of_policy or teacher == "head1")
    known = min(first_pass, 1) if teacher else first_pass  # heads whose targets of weight zero are known by it

    def products(hidden: Tensor, unembedding: Tensor, **_: object) -> Tensor:
        total = hidden.new_zeros(())
        if teacher == "head1" and first_pass > 1:
            _forward(hidden[:1], unembedding)
        for head, states in enumerate(hidden.flatten(1, 2)):
            weighted = len(states) if anchored and head == 0 else round(kept * len(states))
            if anchored and head == 0:
                _forward(states[None, None], unembedding)
            if head < first_pass:
                _forward(states[None, None], unembedding)
            if head >= known:
                _forward(states[None, None, weighted:], unembedding)
            total = total + (states[:weighted] @ scaled_gradient(unembedding, factors[head]).T).sum()
        return total

    return products


def _states(hidden: Tensor, unembedding: Tensor, **_: object) -> Tensor:
    return hidden


@torch.no_grad()
def _forward(hidden: Tensor, unembedding: Tensor, **_: object) -> Tensor:
    return hidden.flatten(0, 2) @ unembedding.T


def kept_share(weighting: AnyWeighting, heads: int) -> float:
    """Returns the share of targets with a weight above zero, on a document of random signals."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros((1, _SAMPLE), dtype=torch.int64)
    named = {name: torch.rand((1, _SAMPLE), generator=generator) for name in sorted(weighting.needs)}
    for name in named.keys() & set(OF_THE_POLICY):
        named[name] = torch.rand((heads if weighting.per_head else 1, 1, _SAMPLE), generator=generator)
    signals = Signals(labels, torch.ones((heads, 1, _SAMPLE), dtype=torch.bool), None, named, training=False)
    weights = weighting(signals)
    return 1.0 if weights is None else float((weights > 0).double().mean())
