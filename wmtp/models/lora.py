"""Low-rank adapters on the decoder's projections, and other parts trained with them.

    LoRA (Hu et al. 2021, arXiv 2106.09685)     y = W x + alpha / r * B A x
    DoRA (Liu et al. 2024, arXiv 2402.09353)    y = m * (W + alpha / r * B A) x / |W + alpha / r * B A|, norms by row

Order of use: build the decoder, :func:`add_lora`, then activation checkpointing and sharding, then `load_checkpoint`
(which fills W alone) and :func:`init_lora`. Exports hold the merged weight.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules.peft import DoRALinear, LoRALinear

from wmtp.errors import UserError
from wmtp.models.block import RMSNorm
from wmtp.models.load import local_part, local_tensor, own_name
from wmtp.models.nf4 import check_nf4_shape, is_nf4, mark_nf4, quantized_modules
from wmtp.numerics.keyed import keyed_generator
from wmtp.pretrained.checkpoint_formats import stored_together

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # of dtypes, for people

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "output_proj")
MLP_TARGETS = ("w1", "w2", "w3")
TRUNK, HEADS, QUANTIZE = ("lora", "frozen"), ("full", "lora", "frozen"), (None, "nf4")


@dataclass(frozen=True)
class Adapters:
    """The arguments that :func:`add_lora` adapted a model with, kept as ``model.adapters``."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    dora: bool
    trunk: str
    heads: str
    train_norms: bool
    train_unembedding: bool
    quantize: str | None


def add_lora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = (*ATTENTION_TARGETS, *MLP_TARGETS),
    dora: bool = False,
    trunk: str = "lora",
    heads: str = "lora",
    train_norms: bool = False,
    train_unembedding: bool = False,
    quantize: str | None = None,
    quantize_from: torch.dtype | None = None,
    seed: int = 0,
) -> nn.Module:
    """Puts adapters on the projections of a decoder's blocks, in place, and freezes all parameters not named here.

    Head 1 belongs to the trunk here: its block is the last one of the pretrained model, for `transformers` and `peft`
    too. So ``trunk`` is about ``model.layers`` and ``heads`` about ``model.extra_heads``, heads 2 to H.

    Args:
        model: an :class:`~wmtp.models.MTPDecoder`, on the meta device or not, not yet sharded.
        rank: r, the inner width of the adapters.
        alpha: the adapters' output is scaled by alpha / rank.
        dropout: share of the adapters' input that training drops, in [0, 1).
        targets: the projections: q_proj, k_proj, v_proj, output_proj of the attention; w1 (gate), w2 (down), w3 (up)
            of the MLP.
        dora: train a magnitude for each row besides the low-rank direction. It starts as the row's norm, so the model
            starts as the base, bit for bit, where the computation has the weights' own dtype.
        trunk: ``lora``: adapters; ``frozen``: nothing below the extra heads is trained, and nothing keeps activations.
        heads: ``full``: trained whole; ``lora``: adapters; ``frozen``.
        train_norms: train the norms of every block that has trained parameters, and the shared last one.
        train_unembedding: train the unembedding, and so the embedding of a tied model.
        quantize: ``nf4``: the projections of the trunk's blocks, without those of the heads, are held in 4 bits. Those
            of a model on the meta device are quantised one by one when `load_checkpoint` reads them.
        quantize_from: dtype that weights are rounded to before, which should be the computation's: reading them back
            then takes 39 bytes a weight instead of float32's 65. By default their own.
        seed: of A, see :func:`init_lora`, which a model on the meta device needs later.

    Raises:
        ValueError: a value out of range, an unknown target, or a choice that trains nothing.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    chosen = Adapters(
        rank, alpha, dropout, targets, dora, trunk, heads, train_norms, train_unembedding, quantize
    )  # fmt: skip
    _check(chosen, model)
    model.requires_grad_(False)
    if quantize is not None:
        for index, block in enumerate(model.layers[:-1]):
            for target in (*ATTENTION_TARGETS, *MLP_TARGETS):
                check_nf4_shape(_place(block, target)[1].weight.shape, f"layers.{index}.{target}")
    for blocks, how in ((model.layers, trunk), (model.extra_heads, heads)):
        for block in blocks:
            block.requires_grad_(how == "full")
            for target in targets if how == "lora" else ():
                parent, linear = _place(block, target)
                setattr(parent, target, _adapted(linear, chosen))
            if train_norms and how != "frozen":
                for module in block.modules():
                    if isinstance(module, RMSNorm):
                        module.requires_grad_(True)
    if train_norms:
        model.norm.requires_grad_(True)
    if train_unembedding:
        model.unembedding.requires_grad_(True)
    if quantize is not None:
        for block in model.layers[:-1]:
            for target in (*ATTENTION_TARGETS, *MLP_TARGETS):
                mark_nf4(_place(block, target)[1], quantize_from)
    model.adapters = chosen
    if not any(parameter.is_meta for parameter in model.parameters()):
        init_lora(model, seed=seed)
    return model


def _check(chosen: Adapters, model: nn.Module) -> None:
    known = (*ATTENTION_TARGETS, *MLP_TARGETS)
    strangers = [str(target) for target in chosen.targets if target not in known]
    if strangers or not chosen.targets:
        raise UserError(f"targets must be one or more of {', '.join(known)}, got {', '.join(strangers) or 'none'}")
    if chosen.rank < 1:
        raise UserError(f"rank must be a whole number >= 1, got {chosen.rank!r}")
    if not 0 < chosen.alpha < math.inf:
        raise UserError(f"alpha must be a number > 0, got {chosen.alpha!r}")
    if not 0 <= chosen.dropout < 1:
        raise UserError(f"dropout must be in [0, 1), got {chosen.dropout!r}")
    for key, allowed in (("trunk", TRUNK), ("heads", HEADS), ("quantize", QUANTIZE)):
        if getattr(chosen, key) not in allowed:
            options = ", ".join("null" if option is None else option for option in allowed)
            raise UserError(f"{key} must be one of {options}, got {getattr(chosen, key)!r}")
    for together in ({"q_proj", "k_proj", "v_proj"}, {"w1", "w3"}):
        names = [f"layers.0.{'mlp' if target.startswith('w') else 'attn'}.{target}.weight" for target in together]
        if stored_together(names[0], model.config) and 0 < len(together & set(chosen.targets)) < len(together):
            raise UserError(
                f"targets must have all of {', '.join(sorted(together))} or none, as {model.config.family} stores them "
                f"as one, got {', '.join(chosen.targets)}"
            )
    extra = len(model.extra_heads)
    if chosen.trunk == "frozen" and not (chosen.train_norms or chosen.train_unembedding):
        if extra == 0:
            raise UserError("trunk frozen leaves nothing to train in a model with one head; set num_future_tokens > 1")
        if chosen.heads == "frozen":
            raise UserError("trunk frozen and heads frozen leave nothing to train; set heads to full or lora")
    if chosen.trunk == "frozen" and chosen.train_unembedding and model.config.tie_word_embeddings:
        raise UserError(
            "train_unembedding trains the embedding of a tied model, which lies below the frozen trunk; set it to "
            "false, or trunk to lora"
        )
    if hasattr(model, "adapters"):
        raise ValueError("the model has adapters already; add them once, first")


def store_frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Stores the parameters that are not trained in a dtype: the computation's, to which they would be rounded when
    FSDP2 gathers them. Quantised weights stay as they are."""
    quantized = {id(module.weight) for _, module in quantized_modules(model)}
    for parameter in model.parameters():
        if not parameter.requires_grad and id(parameter) not in quantized:
            parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def init_lora(model: nn.Module, *, seed: int = 0) -> None:
    """Sets A to uniform values within 1 / sqrt(in_dim) (as the authors' code does), B to zero and m to W's norms.

    The values depend on the seed, the parameter's name and W alone, and are equal at any world size.
    """
    for name, module in lora_modules(model):
        generator = keyed_generator(seed, name)
        bound = 1 / math.sqrt(module.in_dim)
        a = torch.rand(module.rank, module.in_dim, generator=generator).mul_(2 * bound).sub_(bound)
        local_tensor(module.lora_a.weight).copy_(local_part(a, module.lora_a.weight))
        local_tensor(module.lora_b.weight).zero_()
        if isinstance(module, DoRALinear):
            weight, magnitude = module.weight, module.magnitude
            if is_nf4(weight):  # whole on every process, unlike m
                norms = local_part(torch.linalg.norm(weight.to(magnitude.dtype), dim=1), magnitude)
            else:
                norms = torch.linalg.norm(local_tensor(weight).to(magnitude.dtype), dim=1)  # both are cut by rows
            local_tensor(magnitude).copy_(norms)


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoRALinear | DoRALinear]]:
    """Yields (name, module) of every adapted projection, by the module's own name, whatever wraps the blocks."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | DoRALinear):
            yield own_name(name), module


def adapter_parameters(module: LoRALinear | DoRALinear) -> list[nn.Parameter]:
    """Returns A [r, in], B [out, r] and, for DoRA, m [out]."""
    return [module.lora_a.weight, module.lora_b.weight, *([module.magnitude] if hasattr(module, "magnitude") else [])]


def merged_weight(weight: Tensor, module: LoRALinear | DoRALinear, a: Tensor, b: Tensor, m: Tensor | None = None):
    """Returns the matrix [out, in] that equals W [out, in] with A [r, in], B [out, r] (and m [out]), in float32."""
    merged = weight.float() + module.alpha / module.rank * (b.float() @ a.float())
    if m is not None:
        merged *= (m.float() / torch.linalg.norm(merged, dim=1))[:, None]
    return merged


def refuse_quantized(model: nn.Module, merge_quantized: bool) -> None:
    """Refuses to merge a model's quantised weights unless merge_quantized asks for it."""
    if not merge_quantized and any(True for _ in quantized_modules(model)):
        raise UserError(
            "the trunk is quantised to nf4, and merge_quantized is false: merged weights hold its rounding errors; "
            "set merge_quantized=true to have that, or keep the adapter apart (export_merged=none)"
        )


class _LoRALinear(LoRALinear):
    """torchtune's layer, with alpha / r applied at the inner width r: it saves two passes over the output a step."""

    def forward(self, x: Tensor) -> Tensor:
        if is_nf4(self.weight) or self.disabled:
            return super().forward(x)
        low = self.lora_a(self.dropout(x)) * (self.alpha / self.rank)  # [..., r]
        return F.linear(x, self.weight, self.bias) + self.lora_b(low)


class _BiasedDoRALinear(DoRALinear):
    """torchtune's layer for a projection with a bias, which it would scale by m / |W + alpha / r * B A| too."""

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled:
            return F.linear(x, self.weight, self.bias)
        base, low = F.linear(x, self.weight, self.bias), self.lora_b(self.lora_a(self.dropout(x)))
        turned = self.weight.to(x.dtype) + self.scaling * (self.lora_b.weight @ self.lora_a.weight).detach()
        share = self.magnitude / torch.linalg.norm(turned, dim=1)
        return base + (share - 1) * (base - self.bias) + share * self.scaling * low


def _place(block: nn.Module, target: str) -> tuple[nn.Module, nn.Module]:
    """Returns the module of a block that holds a target, and the target's linear layer."""
    parent = block.attn if target in ATTENTION_TARGETS else block.mlp
    return parent, getattr(parent, target)


def _adapted(linear: nn.Module, chosen: Adapters) -> LoRALinear | DoRALinear:
    if type(linear) is not nn.Linear:
        raise ValueError(f"adapters go on plain linear layers, found {type(linear).__name__}; add them once, first")
    out_dim, in_dim = linear.weight.shape
    kind = (DoRALinear if linear.bias is None else _BiasedDoRALinear) if chosen.dora else _LoRALinear
    with torch.device("meta"):
        adapted = kind(in_dim, out_dim, rank=chosen.rank, alpha=chosen.alpha, dropout=chosen.dropout)
    adapted.rank, adapted.alpha = chosen.rank, chosen.alpha  # DoRALinear keeps their ratio alone
    adapted.weight, adapted.bias = linear.weight, linear.bias
    adapted.to_empty(device=linear.weight.device)  # torchtune's modules make the adapter's parameters alone
    for parameter in adapter_parameters(adapted):
        parameter.data = parameter.data.to(linear.weight.dtype)
    return adapted


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Counts (trained, all) parameters, over all processes."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
