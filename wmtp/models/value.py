"""The critic's value model: V_t, the value of the prefix x_<=t, from a head on a decoder's hidden states.

A saved value model is a folder:

    config.json, model.safetensors, tokenizer.json, ...   the backbone, as `export_hf` writes it (adapters merged)
    value_head.safetensors                                the head's weights, float32
    value_model.json                                      the head's kind, sizes, settings of its training, vocab_hash
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from wmtp.errors import UserError
from wmtp.models.builders import from_checkpoint
from wmtp.models.decoder import MTPDecoder
from wmtp.models.export import full_parameter, whole_folder, write_hf
from wmtp.models.load import load_checkpoint, local_part, local_tensor, own_name
from wmtp.models.parallel import shard_model
from wmtp.numerics.keyed import keyed_generator
from wmtp.pretrained.checkpoint_formats import open_safetensors
from wmtp.pretrained.config_files import CheckpointError, read_json
from wmtp.pretrained.resolve import resolve_checkpoint

HEADS = ("linear", "mlp")
HEAD_WEIGHTS, VALUE_CONFIG = "value_head.safetensors", "value_model.json"


class ValueHead(nn.Module):
    """The head that maps hidden states [..., D] of any dtype to values [...], in float32.

    Args:
        kind: ``linear``: D -> 1; ``mlp``: D -> D, SiLU, D -> 1. Both start at value 0, see :meth:`init_weights`.
    """

    def __init__(self, embed_dim: int, kind: str = "linear") -> None:
        super().__init__()
        if kind not in HEADS:
            raise UserError(f"head must be one of {', '.join(HEADS)}, got {kind!r}")
        self.kind = kind
        self.hidden = nn.Linear(embed_dim, embed_dim) if kind == "mlp" else None
        self.out = nn.Linear(embed_dim, 1)
        if not self.out.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Sets the output layer and biases to zero, the inner layer to normal with standard deviation D^-1/2.

        The values depend on the seed alone: every rank of a sharded head cuts its part out of the same full tensor.
        """
        for parameter in self.parameters():
            local_tensor(parameter).zero_()
        if self.hidden is not None:
            generator = keyed_generator(seed, "value_head.hidden")
            weight = self.hidden.weight
            full = torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1])
            local_tensor(weight).copy_(local_part(full, weight))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.float()
        if self.hidden is not None:
            hidden = nn.functional.silu(self.hidden(hidden))
        return self.out(hidden).squeeze(-1).clone()  # FSDP2 warns of outputs that are views


class ValueModel(nn.Module):
    """The model of V_t = head(h_t), where h_t is the normed hidden state of the backbone's head 1 at position t.

    `wmtp.models.shard_model` and `checkpoint_activations` take it like a decoder; `load_checkpoint` takes its backbone.

    Args:
        backbone: a decoder with H = 1; its unembedding is not used. Freeze it (``requires_grad_(False)``) to train the
            head alone: then it keeps neither activations nor optimizer state.
        head: ``linear`` or ``mlp``.
    """

    def __init__(self, backbone: MTPDecoder, head: str = "linear") -> None:
        super().__init__()
        if backbone.num_future_tokens != 1:
            raise UserError(
                f"a value model reads head 1 alone: build its backbone with num_future_tokens 1, "
                f"got {backbone.num_future_tokens}"
            )
        self.backbone, self.config = backbone, backbone.config
        self.num_future_tokens, self.vocab_size, self.max_seq_len = 1, backbone.vocab_size, backbone.max_seq_len
        with backbone.norm.scale.device:
            self.value_head = ValueHead(backbone.embed_dim, head)
        self.float32_modules = (self.value_head,)  # `shard_model` shards them on their own, without mixed precision

    @property
    def layers(self) -> nn.ModuleList:
        return self.backbone.layers

    @property
    def extra_heads(self) -> nn.ModuleList:
        return self.backbone.extra_heads

    def forward(
        self,
        tokens: Tensor,
        *,
        document_ids: Tensor | None = None,
        hidden: Tensor | None = None,
        return_hidden: bool = False,
    ) -> Tensor:
        """Computes the values [B, S], float32.

        Args:
            tokens: [B, S] token ids.
            document_ids: [B, S], as in :meth:`wmtp.models.MTPDecoder.forward`; None where each row is one document
                (padding at a row's end does not influence the tokens before it).
            hidden: [B, S, D], the result of ``return_hidden`` for these tokens: the backbone does not run again.
            return_hidden: return the hidden states [B, S, D] that the head reads, in the computation's dtype.
        """
        if hidden is None:
            hidden = self.backbone.hidden_states(tokens, document_ids=document_ids, num_heads=1)[0]
        return hidden if return_hidden else self.value_head(hidden)


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading


def save_value_model(
    model: ValueModel,
    folder: str | Path,
    *,
    tokenizer: Any,
    settings: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a value model's folder, which appears whole or not at all. Every rank of a sharded model calls this.

    Args:
        model: sharded or not; adapters are merged into the written weights.
        folder: must not exist.
        tokenizer: the backbone's, a :class:`wmtp.pretrained.Tokenizer`; it goes into the folder.
        settings: of its training (loss, reward, ...), as JSON; kept in value_model.json.
        dtype: of the stored backbone; by default each parameter's own. The head is stored in float32.

    Raises:
        FileExistsError: the folder is there already.
    """
    with whole_folder(model, Path(folder), "value model") as writing:
        write_hf(model.backbone, writing, tokenizer, dtype)
        head = {own_name(name): full_parameter(p) for name, p in model.value_head.named_parameters()}
        if writing is None:
            return
        head = {name: tensor.to("cpu", torch.float32, copy=True).contiguous() for name, tensor in head.items()}
        save_file(head, writing / HEAD_WEIGHTS, metadata={"format": "pt"})
        about = {"head": model.value_head.kind, "embed_dim": model.config.embed_dim, "settings": settings}
        about |= {"vocab_size": model.vocab_size, "vocab_hash": tokenizer.vocab_hash()}
        (writing / VALUE_CONFIG).write_text(json.dumps(about, indent=2) + "\n")


def load_value_model(
    path: str | Path,
    *,
    mesh: DeviceMesh | None = None,
    param_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cpu_offload: bool = False,
) -> ValueModel:
    """Loads a saved value model, frozen and in evaluation mode; each rank of a mesh reads its own shards.

    Args:
        path: a folder of :func:`save_value_model`, or ``runs:/<MLflow run id>/<artifact path>``.
        mesh: shard over it with FSDP2; None gives a plain model.
        param_dtype: of the backbone's weights and computation; the head's is float32.
        device: of the parameters; with ``cpu_offload`` they stay in host memory between uses.

    Raises:
        CheckpointError: no value model there, or files that do not fit together.
    """
    folder = resolve_checkpoint(path)
    about = value_model_config(folder)
    with torch.device("meta"):
        model = ValueModel(from_checkpoint(folder, num_future_tokens=1), about["head"])
    if about["embed_dim"] != model.config.embed_dim or about["vocab_size"] != model.vocab_size:
        raise CheckpointError(f"{folder / VALUE_CONFIG} and config.json give different sizes; copy the folder again")
    model.requires_grad_(False).eval()
    model.backbone.to(param_dtype)  # as it would be rounded when it is gathered
    if mesh is not None:
        shard_model(model, mesh, param_dtype=param_dtype, cpu_offload=cpu_offload)
        device = "cpu" if cpu_offload else device
    model.to_empty(device=device)
    load_checkpoint(model.backbone, folder)
    _load_head(model.value_head, folder / HEAD_WEIGHTS)
    return model


def value_model_config(path: str | Path) -> dict[str, Any]:
    """Reads value_model.json: head, embed_dim, vocab_size, vocab_hash, settings.

    Raises:
        CheckpointError: the folder holds no value model.
    """
    file = resolve_checkpoint(path) / VALUE_CONFIG
    if not file.is_file():
        raise CheckpointError(f"{file.parent} holds no value model ({VALUE_CONFIG}); train one with critic_stage1.py")
    return read_json(file, "head", "embed_dim", "vocab_size", "vocab_hash", "settings")


def value_tokenizer(path: str | Path):
    """Returns the tokenizer of a saved value model; `require_same_vocabulary` compares it with the policy's.

    Raises:
        CheckpointError: the value model was trained with another tokenizer than the folder's.
    """
    from wmtp.pretrained.tokenizer import hf_tokenizer  # which imports this package

    folder = resolve_checkpoint(path)
    tokenizer = hf_tokenizer(folder)
    if tokenizer.vocab_hash() != value_model_config(folder)["vocab_hash"]:
        raise CheckpointError(
            f"the tokenizer in {folder} is not the one its value model was trained with (vocab_hash differs); "
            "copy the folder again"
        )
    return tokenizer


@torch.no_grad()
def _load_head(head: ValueHead, file: Path) -> None:
    stored, parameters = open_safetensors(file), dict(head.named_parameters())
    shapes = {key: tensor.shape for key, tensor in stored.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if shapes != expected:
        raise CheckpointError(f"{file} holds {shapes}, a {head.kind} head has {expected}; copy the folder again")
    for name, parameter in parameters.items():
        local_tensor(parameter).copy_(local_part(stored[name].read(), parameter))
