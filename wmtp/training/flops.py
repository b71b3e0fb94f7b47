"""Operations of an optimizer step, from shapes alone: what equal compute means in a study."""

import torch
from omegaconf import DictConfig

from wmtp.config import build
from wmtp.loss import HeadTraining, ReferenceReading
from wmtp.models.value import load_value_model
from wmtp.pretrained import resolve_checkpoint
from wmtp.training.performance import adapters_off_flops, model_flops
from wmtp.weighting.base import OF_THE_POLICY, AnyWeighting, Signals, any_weighting

_SAMPLE = 4096  # targets of the sample that tells how many a weighting leaves out


def flops_per_step(cfg: DictConfig) -> float:
    """Counts the floating-point operations of one process's optimizer step of a training config.

    The config's models are built on the meta device, which knows shapes and no numbers, so 7B takes seconds and no
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
    heads.prepare(policy.num_future_tokens, cfg.get("head_weights"), "meta", model=policy)
    factors = heads.at(0).get("trunk_gradient")
    anchor, adapted = build(cfg.get("anchor"), where="anchor"), cfg.get("adapters") is not None
    tokens = cfg.get("tokens_per_step") or cfg.batch_size * (cfg.get("gradient_accumulation_steps") or 1) * cfg.seq_len

    trained, read = loss_products(
        weighting, policy.num_future_tokens, teacher=heads.teacher, anchored=anchor is not None
    )
    flops = model_flops(policy, trunk_gradient=factors).of(tokens, cfg.seq_len, [tokens * share for share in trained])
    flops += 2 * policy.vocab_size * policy.embed_dim * tokens * read
    scores = ReferenceReading(weighting.needs, heads.soft_targets).asked
    if (scores or (anchor is not None and not adapted)) and cfg.get("reference_model") is not None:
        with torch.device("meta"):
            reference = build(cfg.reference_model, where="reference_model").requires_grad_(False)
        flops += model_flops(reference, trunk_gradient=(1.0,)).of(tokens, cfg.seq_len, [tokens] * scores)
    if "values" in weighting.needs and cfg.get("value_model") is not None:
        flops += model_flops(load_value_model(resolve_checkpoint(cfg.value_model))).of(tokens, cfg.seq_len)
    if anchor is not None and adapted:
        flops += adapters_off_flops(policy).of(tokens, cfg.seq_len)
    return flops


def loss_products(
    weighting: AnyWeighting, heads: int, *, teacher: str | None = None, anchored: bool = False
) -> tuple[list[float], float]:
    """Returns what the fused loss multiplies by the unembedding, as shares of a head's targets.

    Args:
        teacher: whose distributions are soft targets, if any are.
        anchored: whether head 1 has an anchor, whose logits are those of its states.

    Returns:
        the share of each head's targets that have a gradient, and the sum of those whose logits alone are computed.
    """
    kept = kept_share(weighting, heads)
    of_policy = bool(weighting.needs.intersection(OF_THE_POLICY))
    first_pass = heads if of_policy and weighting.per_head else int(of_policy or teacher == "head1")
    known = min(first_pass, 1) if teacher else first_pass  # heads whose targets of weight zero are known by it
    trained = [1.0 if anchored and head == 0 else kept for head in range(heads)]
    read = first_pass + anchored + (teacher == "head1" and first_pass > 1)
    return trained, read + sum(1 - share for share in trained[known:])


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
