"""Pretrained models by name (folder, s3://, MLflow, wheel, GGUF file): their shape, tensors, configs and tokenizer."""

from wmtp.pretrained.checkpoint_formats import read_shape
from wmtp.pretrained.config_files import CheckpointError
from wmtp.pretrained.resolve import checkpoint_sha256, model_tags, resolve_checkpoint
from wmtp.pretrained.shape import DecoderShape
from wmtp.pretrained.tokenizer import Tokenizer, byte_tokenizer, hf_tokenizer, require_same_vocabulary
