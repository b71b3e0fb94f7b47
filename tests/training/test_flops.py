"""The operations of a step, beside torch's own count on tensors without data and the real loss's products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wmtp.config import build
from wmtp.config.files import load
from wmtp.loss import AnchorStates, SoftTargets, mtp_loss
from wmtp.numerics.fork import scaled_gradient
from wmtp.training.flops import flops_per_step, kept_share, loss_products
from wmtp.training.performance import adapters_off_flops, model_flops
from wmtp.weighting import any_weighting, dft, protect, random_matched, rho1, token_cleaning, uniform


def config(name, *changes):
    cfg = load(f"configs/{name}.yaml")
    for key, value in changes:
        cfg[key] = value
    return cfg


def model_of(cfg):
    with torch.device("meta"):
        model = build(cfg.model, where="model")
        if cfg.get("adapters") is not None:
            build(cfg.adapters, model, where="adapters", seed=0)
    return model


def counted(cfg, factors=None):
    """Counts a step with the logits of all heads, as torch counts one of tensors without data."""
    model = model_of(cfg)
    factors = factors or (1.0,) * model.num_future_tokens

    def logits(hidden, unembedding, **_):
        each = zip(hidden.flatten(1, 2), factors, strict=True)
        return sum((states @ scaled_gradient(unembedding, factor).T).sum() for states, factor in each)

    with FlopCounterMode(display=False) as counter:
        model(
            torch.zeros((1, cfg.seq_len), dtype=torch.int64, device="meta"), loss_fn=logits, trunk_gradient=factors
        ).backward()
    return counter.get_total_flops() * cfg.batch_size * cfg.gradient_accumulation_steps


@pytest.mark.parametrize("name", ["tiny/uniform", "smollm2_135m/uniform"])
def test_plain_training_is_torch_s_count(name):
    assert flops_per_step(config(name)) == counted(config(name))


def test_adapters_save_the_gradients_of_what_is_frozen():
    cfg = config("tiny/lora_rho1", ("weighting", config("tiny/uniform").weighting))
    assert flops_per_step(cfg) == pytest.approx(counted(cfg), rel=1e-12)
    assert flops_per_step(cfg) < flops_per_step(config("tiny/uniform"))


def test_a_step_of_so_many_targets_is_so_many_positions():
    cfg = config("tiny/uniform")
    targets = config("tiny/uniform", ("gradient_accumulation_steps", None), ("tokens_per_step", 1024))
    assert flops_per_step(targets) == flops_per_step(cfg) * 1024 / (cfg.batch_size * cfg.seq_len)


def products(weighting, heads=3, seq=201, dim=8, vocab=50, **options):
    """Counts the real loss's operations on a document in which every position but the first is a target."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((heads, 1, seq, dim), generator=generator, requires_grad=True)
    unembedding = torch.randn((vocab, dim), generator=generator, requires_grad=True)
    labels = torch.randint(0, vocab, (1, seq), generator=generator)
    signals = {"reference_ce": torch.rand((1, seq), generator=generator)}
    counts = {torch.ops.aten.bmm: lambda *_, **__: 0}  # a sum of products of two rows, not of matrices
    counts |= {torch.ops.aten.addmm_: lambda total, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=counts) as counter:
        mtp_loss(hidden, unembedding, labels, any_weighting(weighting), signals=signals, **options).loss_sum.backward()
    targets = sum(seq - k for k in range(1, heads + 1))
    return counter.get_total_flops() / (2 * dim * vocab * targets)


METHODS = {
    "uniform": uniform(),
    "select": rho1(percentile=0.6),
    "select, by head": rho1(percentile=0.6, per_head=True),
    "soft": rho1(mode="soft"),
    "dft": dft(),
    "random_matched": random_matched(rho1(percentile=0.6)),
}


ANCHOR = AnchorStates(torch.zeros(1, 201, 8), torch.zeros(50, 8), 0.1)
OPTIONS = {"joint": {}, "detached": {"trunk_gradient": (1.0, 0.0, 0.0)}, "soft": {"head_targets": SoftTargets(top_k=4)}}
OPTIONS |= {"anchored": {"anchor": ANCHOR}}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_the_products_are_those_of_the_fused_loss(method, options):
    """GEMMs a target, of the real loss: ours are counted on all positions, so they agree to the documents' edges."""
    heads, chosen = 3, OPTIONS[options]
    teacher = "head1" if "head_targets" in chosen else None
    trained, read = loss_products(any_weighting(METHODS[method]), heads, teacher=teacher, anchored="anchor" in chosen)
    factors = chosen.get("trunk_gradient", (1.0,) * heads)
    ours = read + sum(share * (2 + (factor > 0)) for share, factor in zip(trained, factors, strict=True))
    assert ours / heads == pytest.approx(products(METHODS[method], **chosen), rel=0.02)


def test_options_of_the_heads_and_methods_that_want_preparation_are_counted():
    joint = config("tiny/uniform")
    detached = config("tiny/uniform", ("heads", {"_component_": "wmtp.loss.HeadTraining", "trunk_gradient": 0.0}))
    factors = (1.0,) + (0.0,) * (joint.model.num_future_tokens - 1)
    assert flops_per_step(detached) == counted(joint, factors)
    soft = config("tiny/uniform", ("heads", {"_component_": "wmtp.loss.HeadTraining", "targets": "soft"}))
    assert flops_per_step(detached) < flops_per_step(joint) < flops_per_step(soft)
    assert kept_share(rehearsed(token_cleaning(0.6)), 2) == pytest.approx(0.6, abs=0.03)
    assert kept_share(rehearsed(token_cleaning(0.2)), 2) == pytest.approx(0.2, abs=0.03)
    assert kept_share(rehearsed(protect(rho1(percentile=0.3))), 2) == 1.0, "all labels are the protected token there"


def test_an_anchor_is_counted_with_the_model_that_it_is_held_against():
    anchor = ("anchor", {"_component_": "wmtp.loss.Anchor"})
    cfg = config("tiny/uniform")
    reference = config("tiny/rho1").reference_model
    tokens = cfg.seq_len * cfg.batch_size * cfg.gradient_accumulation_steps
    logits = 2 * tokens * cfg.model.embed_dim * cfg.model.vocab_size
    forward = model_flops(model_of(config("tiny/uniform", ("model", reference))).requires_grad_(False))
    beside = flops_per_step(config("tiny/uniform", anchor, ("reference_model", reference)))
    assert beside == pytest.approx(flops_per_step(cfg) + forward.of(tokens, cfg.seq_len) + logits, rel=1e-9)
    adapted = config("tiny/lora_rho1", ("weighting", cfg.weighting))
    off = model_of(config("tiny/uniform", ("model", {**adapted.model, "num_future_tokens": 1})))  # trunk and head 1
    adapted_forward = model_flops(off.requires_grad_(False)).of(tokens, cfg.seq_len)
    with_anchor = flops_per_step(config("tiny/lora_rho1", ("weighting", cfg.weighting), anchor))
    assert with_anchor - flops_per_step(adapted) == pytest.approx(adapted_forward + logits, rel=1e-9)
    by_hand = adapters_off_flops(model_of(adapted)).of(tokens, cfg.seq_len, [tokens] * 4)
    assert by_hand == pytest.approx(adapted_forward + logits, rel=1e-9)


def rehearsed(weighting):
    weighting.rehearse()
    return weighting


def test_the_share_of_targets_that_a_weighting_keeps():
    assert kept_share(any_weighting(rho1(percentile=0.3)), 2) == pytest.approx(0.3, abs=1e-3)
    assert kept_share(any_weighting(uniform()), 2) == 1.0
