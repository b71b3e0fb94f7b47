"""Decoder with multi-token-prediction heads, value model, their builders, sharding, and checkpoint formats."""

from wmtp.models.adapter_folder import check_adapter, load_adapter, read_adapter, save_adapter
from wmtp.models.builders import codellama_7b, from_checkpoint, llama_mtp, meta_mtp_7b, smollm2_135m
from wmtp.models.checkpoint_formats import read_shape
from wmtp.models.config_files import CheckpointError
from wmtp.models.decoder import MTPDecoder, positions_in_documents
from wmtp.models.export import export_hf
from wmtp.models.load import load_checkpoint
from wmtp.models.lora import Adapters, add_lora, init_lora, merge_lora, refuse_quantized
from wmtp.models.memory import describe_training, parameter_counts, training_bytes
from wmtp.models.parallel import checkpoint_activations, shard_model
from wmtp.models.resolve import checkpoint_sha256, model_tags, resolve_checkpoint
from wmtp.models.shape import LlamaShape
from wmtp.models.teacher_forced import TeacherForced, teacher_forced
from wmtp.models.value import ValueModel, load_value_model, save_value_model, value_model_config, value_tokenizer

__all__ = [
    "Adapters",
    "CheckpointError",
    "LlamaShape",
    "MTPDecoder",
    "TeacherForced",
    "ValueModel",
    "add_lora",
    "check_adapter",
    "checkpoint_activations",
    "checkpoint_sha256",
    "codellama_7b",
    "describe_training",
    "export_hf",
    "from_checkpoint",
    "init_lora",
    "llama_mtp",
    "load_adapter",
    "load_checkpoint",
    "load_value_model",
    "merge_lora",
    "meta_mtp_7b",
    "model_tags",
    "parameter_counts",
    "positions_in_documents",
    "read_adapter",
    "read_shape",
    "refuse_quantized",
    "resolve_checkpoint",
    "save_adapter",
    "save_value_model",
    "shard_model",
    "smollm2_135m",
    "teacher_forced",
    "training_bytes",
    "value_model_config",
    "value_tokenizer",
]
