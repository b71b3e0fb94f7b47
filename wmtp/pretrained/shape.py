"""The numbers that define a decoder with multi-token-prediction heads."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import get_args

from wmtp.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"
_CHOICES = {"qk_norm": ("head", "width"), "norms": ("pre", "post", "both"), "activation": ("silu", "gelu_tanh")}
# Kinds of RoPE: the keys that each must have, and those that it may have, as HF spells them.
_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}


@dataclass(frozen=True)
class DecoderShape:
    """The sizes and constants of a model's computation; a value that no model can have is refused."""

    vocab_size: int
    num_layers: int  # blocks on head 1's path; Meta's n_layers is num_layers + num_future_tokens - 1
    num_heads: int  # attention heads
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int
    num_future_tokens: int = 1
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_scaling: dict | None = None  # rope_type and its factors, with HF's keys; None for plain RoPE
    head_dim: int | None = None  # embed_dim / num_heads if not given
    # What Llama has not: the defaults are Llama's.
    qkv_bias: bool = False  # of the projections to queries, keys and values
    qk_norm: str | None = None  # RMSNorm of queries and keys before RoPE: of each "head", or of all heads' "width"
    norms: str = "pre"  # RMSNorm of what attention and MLP read ("pre"), of what they give ("post"), or "both"
    norm_offset: bool = False  # norms multiply by 1 + their weight
    activation: str = "silu"  # or "gelu_tanh"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what attention and MLP add to the states
    attention_multiplier: float | None = None  # of the scores; head_dim ** -0.5 if not given
    logits_scaling: float = 1.0  # logits are divided by it
    sliding_window: int | None = None  # a token sees itself and so many - 1 before it, in blocks of the sliding kind
    layer_types: tuple[str, ...] | None = None  # of each layer, FULL or SLIDING; None: SLIDING if there is a window
    local_rope_base: float | None = None  # RoPE's base of sliding blocks, unscaled; None: the same RoPE in all
    looped_heads: bool = False  # one block for all extra heads: head k is its output after k - 1 rounds
    family: str = "llama"  # model_type of HF's config.json: how checkpoints of this model are spelt

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value, types = field.name, getattr(self, field.name), get_args(field.type) or (field.type,)
            if value is None and NoneType in types:
                continue
            number = not isinstance(value, bool)
            if int in types and name != "head_dim" and not (number and isinstance(value, int) and value >= 1):
                raise UserError(f"{name} must be a whole number >= 1, got {value!r}")
            if float in types and not (number and isinstance(value, int | float) and 0 < value < math.inf):
                raise UserError(f"{name} must be a number > 0, got {value!r}")
            if name == "looped_heads" and not isinstance(value, bool):
                raise UserError(f"looped_heads must be true or false, got {value!r}")
            if name in _CHOICES and value not in _CHOICES[name]:
                raise UserError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r}")
        if self.embed_dim % self.num_heads:
            raise UserError(f"embed_dim must be a multiple of num_heads {self.num_heads}, got {self.embed_dim}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads must be a multiple of num_kv_heads {self.num_kv_heads}, got {self.num_heads}")
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        if not isinstance(self.head_dim, int) or self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"head_dim must be an even number >= 2 (RoPE turns pairs), got {self.head_dim!r}")
        object.__setattr__(self, "looped_heads", self.looped_heads and self.num_future_tokens > 1)
        object.__setattr__(self, "rope_base", float(self.rope_base))
        object.__setattr__(self, "rope_scaling", checked_scaling(self.rope_scaling))
        self._check_layer_types()

    def _check_layer_types(self) -> None:
        if self.layer_types is None:
            return
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        if len(self.layer_types) != self.num_layers or not set(self.layer_types) <= {FULL, SLIDING}:
            raise UserError(f"layer_types must be {self.num_layers} of {FULL}, {SLIDING}, got {self.layer_types}")
        if SLIDING in self.layer_types and self.sliding_window is None:
            raise UserError(f"layer_types has {SLIDING}, but sliding_window is null; give its length")

    @property
    def num_extra_blocks(self) -> int:
        """Returns how many blocks there are beside the last layer: one for each extra head, or one for all."""
        return 1 if self.looped_heads else self.num_future_tokens - 1

    @property
    def slides(self) -> tuple[bool, ...]:
        """Returns, for each layer and then each extra block (of the last layer's kind), whether it has the window."""
        kinds = self.layer_types or (FULL if self.sliding_window is None else SLIDING,) * self.num_layers
        return tuple(kind == SLIDING for kind in (*kinds, *kinds[-1:] * self.num_extra_blocks))


def checked_scaling(scaling: Mapping | None) -> dict | None:
    """Returns HF's rope_scaling or rope_parameters as a dict with the keys of its kind; None for plain RoPE.

    Kinds that this decoder does not compute, and a key or value that does not belong to its kind, are refused with a
    UserError.
    """
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise UserError(f"rope_scaling must be null or a mapping with rope_type and its factors, got {scaling!r:.60}")
    kinds = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None] or ["default"]
    kind = kinds[0]
    if not isinstance(kind, str) or kind not in _ROPE_KEYS or kinds[-1] != kind:
        got = ", ".join(sorted({f"{kind!r:.60}" for kind in kinds}))
        raise UserError(
            f"rope_scaling type must be one of {', '.join(_ROPE_KEYS)}, got {got}; this decoder has no other, and "
            "without its scaling the model would be another one"
        )
    required, optional = _ROPE_KEYS[kind]
    given = {key: value for key, value in scaling.items() if value is not None}
    for key, value in given.items():
        whole = key == "partial_rotary_factor" and value == 1
        if not whole and key not in ("rope_type", "type", *required, *optional):
            way_out = "give it as rope_base" if key == "rope_theta" else f"this decoder computes no {kind} with it"
            raise UserError(f"rope_scaling of type {kind!r} has no {key}, got {value!r}; {way_out}")
    missing = [key for key in required if key not in given]
    if missing:
        raise UserError(f"rope_scaling of type {kind!r} lacks {', '.join(missing)}; add it, or mend the type")
    kept = {key: given[key] for key in (*required, *optional) if key in given}
    for key, value in kept.items():
        if key == "truncate":
            if not isinstance(value, bool):
                raise UserError(f"rope_scaling {key} must be true or false, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"rope_scaling {key} must be a number > 0, got {value!r}")
    return {"rope_type": kind, **kept} if kept else None
