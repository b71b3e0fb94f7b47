"""Model FLOPs: numbers by hand, and torch's own count of what a step executes."""

import math

import pytest
import torch
from random_models import random_decoder
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wmtp.loss import weighted_mtp_cross_entropy
from wmtp.models import ValueModel, add_lora
from wmtp.training.performance import ModelFlops, model_flops

SMALL = {"vocab_size": 10, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 4, "intermediate_dim": 8}
# The fused loss adds to its gradient in place, which torch's counter does not know.
IN_PLACE = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}


def small(**sizes):
    return random_decoder(**{**SMALL, "max_seq_len": 32, **sizes})


def test_a_whole_model_by_hand():
    model = small(num_future_tokens=2)
    block = 4 * 4 + 2 * (4 * 2) + 4 * 4 + 3 * (4 * 8)  # q, k and v, output, MLP: 144 weights
    assert model_flops(model) == ModelFlops(6 * 3 * block, 12 * 3 * 4, 6 * 10 * 4, heads=2)
    assert model_flops(model).of(tokens=5, seq_len=7, targets=[3, 2]) == 5 * (2592 + 7 * 144) + 5 * 240


def test_frozen_models_cost_their_forward_pass_and_absent_ones_nothing():
    frozen = model_flops(small(num_future_tokens=2).requires_grad_(False))
    assert frozen == ModelFlops(2 * 3 * 144, 4 * 3 * 4, 2 * 10 * 4, heads=2)
    assert model_flops(None).of(5, 7, [3, 2]) == 0
    assert math.isnan(model_flops(torch.nn.Linear(2, 2)).of(5, 7))  # a model of one's own


def test_a_value_model_by_hand():
    model = ValueModel(small(), "linear")
    model.backbone.requires_grad_(False)
    assert model_flops(model) == ModelFlops(2 * 2 * 144 + 4 * 4, 4 * 2 * 4)  # a head of 4 weights
    assert model_flops(model, trunk=False) == ModelFlops(4 * 4, 0)
    hidden, out = model_flops(ValueModel(small(), "mlp")), 4 * 4 + 4
    assert hidden == ModelFlops(6 * (2 * 144 + out), 12 * 2 * 4)


LORA = {
    "whole": None,
    "adapters": {},
    "adapters of one projection": {"targets": ["w2"], "heads": "full"},
    "adapters of the trunk": {"heads": "frozen"},
    "heads alone": {"trunk": "frozen", "heads": "full"},
    "adapters of heads, and norms": {"trunk": "frozen", "heads": "lora", "train_norms": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("adapters", LORA)
def test_it_is_what_torch_counts(adapters, cached, tied):
    sizes = {"vocab_size": 17, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 16}
    model = small(**sizes, intermediate_dim=24, num_future_tokens=3, tie_word_embeddings=tied)
    chosen = LORA[adapters]
    if chosen is not None:
        add_lora(model, rank=2, **chosen)
    cached = cached and chosen is not None and chosen.get("trunk") == "frozen"
    tokens = torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :3] = -100
    state = model(tokens, return_trunk=True).detach() if cached else None
    # CPU's flash kernel is not counted: the plain products are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        out = model(tokens, labels=labels, trunk_state=state, loss_fn=weighted_mtp_cross_entropy)
        out.loss_sum.backward()
    targets = out.valid.sum(dim=(1, 2)).tolist()
    assert model_flops(model, trunk=not cached).of(tokens.numel(), 9, targets) == counter.get_total_flops()


def test_dora_needs_what_lora_needs():
    lora, dora = (model_flops(add_lora(small(), rank=2, dora=dora)) for dora in (False, True))
    assert lora == dora  # the norms of its rows do not grow with the tokens
