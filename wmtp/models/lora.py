"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on the decoder's projections: y = W x + alpha / r * B A x.

Order of use: build the decoder, :func:`add_lora`, then activation checkpointing and sharding, then `load_checkpoint`
(which fills W alone) and :func:`init_lora`. Exports hold W + alpha / r * B A; :func:`merge_lora` makes that the model.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune.modules.peft import LoRALinear

from wmtp.models.load import keyed_generator, local_part, local_tensor, own_name

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "output_proj")
MLP_TARGETS = ("w1", "w2", "w3")


def add_lora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: Sequence[str] = (*ATTENTION_TARGETS, *MLP_TARGETS),
    seed: int = 0,
) -> nn.Module:
    """Put adapters on the projections of every block, in place; all other parameters are frozen.

    Args:
        model: an :class:`~wmtp.models.MTPDecoder`, on the meta device or not, not yet sharded.
        rank: r, the inner width of the adapters.
        alpha: the adapters' output is scaled by alpha / rank.
        dropout: share of the adapters' input that training drops, in [0, 1).
        targets: which projections: q_proj, k_proj, v_proj, output_proj of the attention; w1 (gate), w2 (down),
            w3 (up) of the MLP.
        seed: of A, see :func:`init_lora`; a model on the meta device is initialised by calling that later.

    Raises:
        ValueError: a value out of range, or an unknown target.
    """
    known = (*ATTENTION_TARGETS, *MLP_TARGETS)
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    strangers = [target for target in targets if target not in known]
    if strangers or not targets:
        raise ValueError(f"targets must be one or more of {', '.join(known)}, got {', '.join(strangers) or 'none'}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number >= 1, got {rank!r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a number > 0, got {alpha!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
    model.requires_grad_(False)
    for block in (*model.layers, *model.extra_heads):
        for target in targets:
            parent = block.attn if target in ATTENTION_TARGETS else block.mlp
            setattr(parent, target, _adapted(getattr(parent, target), rank, alpha, dropout))
    if not any(parameter.is_meta for parameter in model.parameters()):
        init_lora(model, seed=seed)
    return model


@torch.no_grad()
def init_lora(model: nn.Module, *, seed: int = 0) -> None:
    """Set A to its random start (uniform within 1 / sqrt(in_dim), as in the authors' code) and B to zero.

    The values depend on the seed and the parameter's name alone: equal at any world size.
    """
    for name, module in lora_modules(model):
        generator = keyed_generator(seed, name)
        bound = 1 / math.sqrt(module.in_dim)
        a = torch.rand(module.rank, module.in_dim, generator=generator).mul_(2 * bound).sub_(bound)
        local_tensor(module.lora_a.weight).copy_(local_part(a, module.lora_a.weight))
        local_tensor(module.lora_b.weight).zero_()


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, module) of every adapted projection, by the module's own name, whatever wraps the blocks."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield own_name(name), module


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, module: LoRALinear) -> Tensor:
    """W + alpha / r * B A in float32, rounded to W's dtype; W [out, in], A [r, in], B [out, r], whole."""
    return (weight.float() + module.alpha / module.rank * (b.float() @ a.float())).to(weight.dtype)


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every adapted projection by a plain one that computes the same, in place.

    Raises:
        ValueError: the model is sharded; export it instead, which merges.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("a sharded model cannot be merged in place; export it, and the exported weights are merged")
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            linear = nn.Linear(module.in_dim, module.out_dim, bias=False, device="meta")
            merged = merged_weight(module.weight, module.lora_a.weight, module.lora_b.weight, module)
            linear.weight = nn.Parameter(merged, requires_grad=module.weight.requires_grad)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, linear)
    return model


def _adapted(linear: nn.Module, rank: int, alpha: float, dropout: float) -> LoRALinear:
    if type(linear) is not nn.Linear:
        raise ValueError(f"adapters go on plain linear layers, found {type(linear).__name__}; add them once, first")
    out_dim, in_dim = linear.weight.shape
    with torch.device("meta"):
        adapted = LoRALinear(in_dim, out_dim, rank=rank, alpha=alpha, dropout=dropout)
    adapted.weight = linear.weight
    for part in (adapted.lora_a, adapted.lora_b):
        part.to(linear.weight.dtype).to_empty(device=linear.weight.device)
    return adapted
