"""The families of models that the decoder computes: in what each differs from Llama, beside `transformers`' own names.

A family is a ``model_type`` of HF's config.json. Each line can be checked against ``modeling_<model_type>.py`` and
``configuration_<model_type>.py`` of `transformers`, whose config class also knows the values of keys that a file lacks.
Keys of config.json that all families share are in known_keys.yaml.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Read = Callable[[Any], Any]


@dataclass(frozen=True)
class Family:
    """What a family has that Llama has not.

    Attributes:
        architecture: the class of `transformers` that reads an export.
        constants: fields of the shape that every model of the family has.
        read: fields of the shape, by how they follow from `transformers`' config.
        keys: of config.json, beside Llama's, that these are read from, or that change no logit.
        fixed: keys of config.json, and the only values that this decoder computes.
        tensors: a parameter's name inside its block, where the checkpoint's is another than Llama's. Several
            parameters with one name are stored as one tensor, their rows in this order.
        rope: the kinds of RoPE that the family's class in `transformers` computes; empty: all of them.
        rope_bases: of RoPE where a file names none: of all blocks, and of sliding blocks where these have their own.
    """

    architecture: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    read: Mapping[str, Read] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    fixed: Mapping[str, list] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    rope: tuple[str, ...] = ()
    rope_bases: tuple[float, float | None] = (10_000.0, None)


def _of(key: str) -> Read:
    return lambda config: getattr(config, key)


_SILU: dict[str, list] = {"hidden_act": ["silu", "swish"], "attention_bias": [False], "mlp_bias": [False]}
_WINDOW: dict[str, Read] = {"sliding_window": _of("sliding_window"), "layer_types": _of("layer_types")}
# Qwen: the first max_window_layers layers see everything, the others the window, if use_sliding_window.
_QWEN_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

FAMILIES = {
    "llama": Family("LlamaForCausalLM", fixed=_SILU),  # Llama 2 and 3, SmolLM2, CodeLlama, DeepSeek-Coder
    "mistral": Family(
        "MistralForCausalLM",
        read={"sliding_window": _of("sliding_window")},  # of all layers
        keys=("sliding_window",),
        fixed=_SILU,
    ),
    "qwen2": Family(  # Qwen 2 and 2.5, also -Coder
        "Qwen2ForCausalLM",
        constants={"qkv_bias": True},
        read=_WINDOW,
        keys=_QWEN_KEYS,
        fixed={"hidden_act": ["silu"], "use_mrope": [False]},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        constants={"qk_norm": "head"},
        read=_WINDOW,
        keys=_QWEN_KEYS,
        fixed=_SILU,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        constants={"qk_norm": "head", "norms": "both", "norm_offset": True, "activation": "gelu_tanh"},
        read={
            "embedding_multiplier": lambda config: config.hidden_size**0.5,
            "attention_multiplier": lambda config: config.query_pre_attn_scalar**-0.5,
            **_WINDOW,
        },
        keys=(
            "query_pre_attn_scalar", "sliding_window", "sliding_window_pattern", "_sliding_window_pattern",
            "layer_types", "rope_local_base_freq", "cache_implementation",
        ),
        fixed={
            "hidden_activation": ["gelu_pytorch_tanh"],
            "hidden_act": ["gelu_pytorch_tanh"],
            "attention_bias": [False],
            "attn_logit_softcapping": [None],
            "final_logit_softcapping": [None],
            "use_bidirectional_attention": [False],
        },
        tensors={"mlp_norm.scale": "pre_feedforward_layernorm.weight"},
        rope_bases=(1_000_000.0, 10_000.0),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        constants={"qk_norm": "width", "norms": "post"},
        fixed=_SILU,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        read={
            key: _of(key)
            for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
        },
        keys=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
        fixed=_SILU,
    ),
    "phi3": Family(  # Phi 3 and 3.5 of 4k, Phi 4
        "Phi3ForCausalLM",
        read={"sliding_window": _of("sliding_window")},  # of all layers
        keys=("sliding_window", "original_max_position_embeddings"),  # the second is for RoPE's kind longrope alone
        fixed={**_SILU, "embd_pdrop": [0], "resid_pdrop": [0]},
        tensors={
            "attn.q_proj.weight": "self_attn.qkv_proj.weight",
            "attn.k_proj.weight": "self_attn.qkv_proj.weight",
            "attn.v_proj.weight": "self_attn.qkv_proj.weight",
            "mlp.w1.weight": "mlp.gate_up_proj.weight",
            "mlp.w3.weight": "mlp.gate_up_proj.weight",
        },
        rope=("default",),
    ),
}  # fmt: skip
