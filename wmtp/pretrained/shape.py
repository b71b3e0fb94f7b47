"""The numbers that define a Llama-family model with multi-token-prediction heads."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from wmtp.errors import UserError

ROPE_SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class LlamaShape:
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
    rope_scaling: dict | None = None  # Llama 3's, with HF's keys: rope_type "llama3" and ROPE_SCALING_KEYS
    head_dim: int | None = None  # embed_dim / num_heads if not given

    def __post_init__(self) -> None:
        for field in fields(self):
            value, number = getattr(self, field.name), not isinstance(getattr(self, field.name), bool)
            if field.type is int and not (number and isinstance(value, int) and value >= 1):
                raise UserError(f"{field.name} must be a whole number >= 1, got {value!r}")
            if field.type is float and not (number and isinstance(value, int | float) and 0 < value < math.inf):
                raise UserError(f"{field.name} must be a number > 0, got {value!r}")
        if self.embed_dim % self.num_heads:
            raise UserError(f"embed_dim must be a multiple of num_heads {self.num_heads}, got {self.embed_dim}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads must be a multiple of num_kv_heads {self.num_kv_heads}, got {self.num_heads}")
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        if not isinstance(self.head_dim, int) or self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"head_dim must be an even number >= 2 (RoPE turns pairs), got {self.head_dim!r}")
        object.__setattr__(self, "rope_base", float(self.rope_base))
        object.__setattr__(self, "rope_scaling", checked_scaling(self.rope_scaling))


def checked_scaling(scaling: Mapping | None) -> dict | None:
    """Returns HF's rope_scaling or rope_parameters as a dict with the keys of Llama 3; None for plain RoPE.

    Every other kind of scaling, and a key or value that does not belong to its kind, is refused with a UserError.
    """
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise UserError(f"rope_scaling must be null or a mapping with rope_type and its factors, got {scaling!r:.60}")
    kinds = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None] or ["default"]
    kind = kinds[0]
    if kind not in ("llama3", "default") or kinds[-1] != kind:
        got = ", ".join(sorted({f"{kind!r:.60}" for kind in kinds}))
        raise UserError(
            f"rope_scaling type must be 'llama3', or 'default' for plain RoPE, got {got};"
            " this decoder has no other, and without its scaling the model would be another one"
        )
    keys = ROPE_SCALING_KEYS if kind == "llama3" else ()
    for key, value in scaling.items():
        whole = key == "partial_rotary_factor" and value == 1
        if value is not None and not whole and key not in ("rope_type", "type", *keys):
            way_out = "give it as rope_base" if key == "rope_theta" else "take it out, or mend the type"
            raise UserError(f"rope_scaling of type {kind!r} has no {key}, got {value!r}; {way_out}")
    missing = [key for key in keys if scaling.get(key) is None]
    if missing:
        raise UserError(f"rope_scaling of type {kind!r} lacks {', '.join(missing)}; add it, or mend the type")
    for key in keys:
        if isinstance(scaling[key], bool) or not isinstance(scaling[key], int | float) or not scaling[key] > 0:
            raise UserError(f"rope_scaling {key} must be a number > 0, got {scaling[key]!r}")
    return {"rope_type": kind, **{key: scaling[key] for key in keys}} if keys else None
