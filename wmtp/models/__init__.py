"""Decoder with multi-token-prediction heads, value model, their builders, sharding, adapters and exports."""

from wmtp import on_demand
from wmtp.models.builders import codellama_7b, from_checkpoint, llama_mtp, meta_mtp_7b, require_fit
from wmtp.models.decoder import MTPDecoder
from wmtp.models.export import export_hf
from wmtp.models.load import load_checkpoint
from wmtp.models.lora import Adapters, add_lora, init_lora, parameter_counts, refuse_quantized, store_frozen
from wmtp.models.parallel import checkpoint_activations, shard_model

__getattr__ = on_demand(
    __name__,
    adapter_folder="check_adapter load_adapter read_adapter save_adapter",
    value="ValueModel load_value_model save_value_model value_model_config value_tokenizer",
)
