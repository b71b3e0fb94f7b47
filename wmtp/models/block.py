"""One transformer block of any family: attention and MLP, each with norms before it, behind it, or both."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torchtune.modules import FeedForward
from torchtune.modules import RMSNorm as RMSNormFloat32

from wmtp.models.masks import Documents, dense_mask
from wmtp.numerics.fork import scaled_gradient
from wmtp.pretrained.shape import DecoderShape


class RMSNorm(RMSNormFloat32):
    """torchtune's, without its cast of the input: F.rms_norm computes in float32 by itself, and only operands of one
    dtype get its fused kernel.

    Args:
        offset: added to the weight (Gemma's norms keep their distance from one).
        multiplier: of the result.
    """

    def __init__(self, dim: int, *, eps: float, offset: bool = False, multiplier: float = 1.0) -> None:
        super().__init__(dim, eps=eps)
        self.offset, self.multiplier = int(offset), multiplier

    def forward(self, x: Tensor, gradient: float = 1.0) -> Tensor:
        """Norms x; the weight's gradient is taken times ``gradient``."""
        scale = scaled_gradient(self.scale, gradient)
        if not self.offset and self.multiplier == 1:
            return rms_norm(x, scale, self.eps)
        weight = (scale.float() + self.offset) * self.multiplier  # half precision would round it
        return rms_norm(x.float(), weight, self.eps).type_as(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


class Attention(nn.Module):
    """Grouped-query attention with RoPE. Its layers have the names of torchtune's MultiHeadAttention, which norms
    queries and keys after RoPE, and no scale of its own for the scores."""

    def __init__(self, shape: DecoderShape, rope: nn.Module) -> None:
        super().__init__()
        dim, self.head_dim = shape.embed_dim, int(shape.head_dim or 0)
        self.num_heads, self.num_kv_heads, self.qk_norm = shape.num_heads, shape.num_kv_heads, shape.qk_norm
        self.scale = shape.attention_multiplier  # None: head_dim ** -0.5
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, queries, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(dim, keys, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(dim, keys, bias=shape.qkv_bias)
        self.output_proj = nn.Linear(queries, dim, bias=False)
        self.q_norm, self.k_norm = (
            family_norm(shape, width if self.qk_norm == "width" else self.head_dim, self.qk_norm is not None)
            for width in (queries, keys)
        )
        self.pos_embeddings = rope

    def forward(self, x: Tensor, *, mask: Any = None, input_pos: Tensor | None = None) -> Tensor:
        """Computes [B, S, D] from [B, S, D]; arguments as in :meth:`Block.forward`."""
        q = self.pos_embeddings(self.by_head(self.q_proj(x), self.q_norm), input_pos=input_pos).transpose(1, 2)
        k = self.pos_embeddings(self.by_head(self.k_proj(x), self.k_norm), input_pos=input_pos).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        if self.num_heads != self.num_kv_heads:
            group = (-1, -1, self.num_heads // self.num_kv_heads, -1, -1)
            k, v = (t.unsqueeze(2).expand(group).flatten(1, 2) for t in (k, v))
        if isinstance(mask, Documents) and torch.compiler.is_compiling():
            mask = dense_mask(mask.ids, mask.window)  # one graph for all lengths
        if isinstance(mask, Documents):
            out = mask.attend(q, k, v, self.scale)
        elif isinstance(mask, BlockMask):
            out = _flex_attention(q, k, v, mask, self.scale)
        else:
            mask = None if mask is None else mask[:, None]  # [B, 1, S, S]
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=self.scale)
        return self.output_proj(out.transpose(1, 2).flatten(-2))

    def by_head(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Cuts queries or keys [..., heads * head_dim] into heads [..., heads, head_dim], and norms them."""
        if self.qk_norm == "width":
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        return norm(x) if self.qk_norm == "head" else x


@torch.compiler.disable(recursive=False)  # compiled itself, also in a block that is compiled or is not
def _flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    from torchtune.modules.attention_utils import flex_attention_compiled  # there on CUDA alone

    return flex_attention_compiled(q, k, v, block_mask=mask, scale=scale)


class Block(nn.Module):
    """A transformer block; a norm that its family has not is an identity.

    h = x + r * sa_post_norm(attn(sa_norm(x))),    out = h + r * mlp_post_norm(mlp(mlp_norm(h)))

    Args:
        rope: shared with the other blocks of its kind.
        slides: its attention has the shape's sliding window: its masks are those that end with it.
    """

    def __init__(self, shape: DecoderShape, rope: nn.Module, slides: bool) -> None:
        super().__init__()
        self.slides = slides
        dim, inner = shape.embed_dim, shape.intermediate_dim
        self.residual_multiplier = shape.residual_multiplier
        self.attn = Attention(shape, rope)
        self.mlp = FeedForward(
            gate_proj=nn.Linear(dim, inner, bias=False),
            down_proj=nn.Linear(inner, dim, bias=False),
            up_proj=nn.Linear(dim, inner, bias=False),
            activation=nn.SiLU() if shape.activation == "silu" else nn.GELU(approximate="tanh"),
        )
        before, behind = shape.norms in ("pre", "both"), shape.norms in ("post", "both")
        self.sa_norm, self.sa_post_norm = family_norm(shape, dim, before), family_norm(shape, dim, behind)
        self.mlp_norm, self.mlp_post_norm = family_norm(shape, dim, before), family_norm(shape, dim, behind)

    def forward(self, x: Tensor, *, mask: Any = None, input_pos: Tensor | None = None) -> Tensor:
        """Computes the block's output [B, S, D].

        Args:
            x: [B, S, D].
            mask: [B, S, S] bool, True where a query may look, or another of wmtp.models.masks; None is plain causal
                attention.
            input_pos: [B, S] positions; None: as in a row of one document.
        """
        h = self.add(x, self.sa_post_norm(self.attn(self.sa_norm(x), mask=mask, input_pos=input_pos)))
        return self.add(h, self.mlp_post_norm(self.mlp(self.mlp_norm(h))))

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """Adds what attention or MLP gives to the states."""
        return x + (out if self.residual_multiplier == 1 else out * self.residual_multiplier)


def family_norm(shape: DecoderShape, dim: int, there: bool = True) -> nn.Module:
    """Returns a family's norm of vectors of ``dim`` numbers, or an identity."""
    return RMSNorm(dim, eps=shape.norm_eps, offset=shape.norm_offset) if there else nn.Identity()
