import pytest
import torch
from random_models import random_decoder

# Small, with every size different, grouped queries and a head_dim that is not embed_dim / num_heads.
TINY = {
    "vocab_size": 67,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 24,
    "intermediate_dim": 40,
    "max_seq_len": 32,
    "head_dim": 8,
}


@pytest.fixture
def tiny():
    """Builds tiny decoders whose every parameter is random: norms too, and wide enough to tell mistakes apart."""

    def build(**changes):
        return random_decoder(**{**TINY, **changes})

    return build


@pytest.fixture
def tiny_hf(tmp_path):
    """Writes random `transformers` Llama folders; returns (model, folder)."""

    def write(folder="hf", *, max_shard_size="5GB", **changes):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = {
            "vocab_size": 67,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.2,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.normal_(1.0, 0.2)
        model.save_pretrained(tmp_path / folder, max_shard_size=max_shard_size)
        return model, tmp_path / folder

    return write
