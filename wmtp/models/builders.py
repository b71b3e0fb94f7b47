"""Builders of models by name, with random weights, or none under torch.device("meta"); `load_checkpoint` fills them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from wmtp.errors import UserError
from wmtp.models.decoder import MTPDecoder
from wmtp.pretrained.checkpoint_formats import form_of, read_shape
from wmtp.pretrained.config_files import read_source
from wmtp.pretrained.resolve import resolve_checkpoint
from wmtp.pretrained.shape import DecoderShape

_WIDTHS_7B: Any = {"num_heads": 32, "num_kv_heads": 32, "embed_dim": 4096, "intermediate_dim": 11_008}


def llama_mtp(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    num_future_tokens: int = 1,
    rope_base: float = 10_000,
    norm_eps: float = 1e-5,
    tie_word_embeddings: bool = False,
    rope_scaling: dict | None = None,
    head_dim: int | None = None,
    looped_heads: bool = False,
    head_init: str = "copies",
    attention: str = "sdpa",
) -> MTPDecoder:
    """Any model of Llama's shape with multi-token-prediction heads.

    Args:
        vocab_size: V, the number of token ids.
        num_layers: blocks on head 1's path: the trunk and head 1. Extra heads are not counted, so that a next-token
            model keeps its number when it gets heads; Meta's n_layers is num_layers + num_future_tokens - 1.
        num_heads, num_kv_heads: attention heads; fewer key/value heads are grouped-query attention.
        embed_dim: D.
        intermediate_dim: width of the MLP.
        max_seq_len: longest sequence of this run; sets the size of the RoPE cache. An export keeps the length of its
            checkpoint.
        num_future_tokens: H, the number of prediction heads.
        rope_base, rope_scaling: RoPE's theta, and its scaling for long contexts, if any, with HF's keys: rope_type
            linear, dynamic, yarn or llama3, and its factors.
        norm_eps: epsilon of RMSNorm.
        tie_word_embeddings: use the embedding as unembedding.
        head_dim: embed_dim / num_heads if not given.
        looped_heads: one block for all of heads 2 to H, which runs k - 1 times for head k, see
            :mod:`wmtp.models.decoder`; with num_future_tokens 1 there is nothing to loop.
        head_init: how heads start that the checkpoint lacks: ``copies`` of its last block, or ``zero_residual``, see
            :mod:`wmtp.models.new_heads`.
        attention: ``sdpa`` or ``flex`` (CUDA).

    Raises:
        ValueError: an argument out of its range.
    """
    config = DecoderShape(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        num_future_tokens=num_future_tokens,
        rope_base=rope_base,
        norm_eps=norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        rope_scaling=rope_scaling,
        head_dim=head_dim,
        looped_heads=looped_heads,
    )
    return MTPDecoder(config, attention=attention, head_init=head_init)


def meta_mtp_7b(
    num_future_tokens: int = 4, max_seq_len: int = 4096, head_init: str = "copies", attention: str = "sdpa"
) -> MTPDecoder:
    """Meta's 7B_200B_4 and 7B_1T_4: 32 blocks, of which 28 are trunk and 4 are heads.

    With ``num_future_tokens=1`` it is their head 1 alone (29 blocks), not the separately trained 7B_*_1 of 32 blocks:
    for those use :func:`from_checkpoint`.

    Args:
        num_future_tokens, max_seq_len, head_init, attention: as in :func:`llama_mtp`.
    """
    return llama_mtp(
        vocab_size=32_000,
        num_layers=29,
        **_WIDTHS_7B,
        max_seq_len=max_seq_len,
        num_future_tokens=num_future_tokens,
        head_init=head_init,
        attention=attention,
    )


def codellama_7b(
    num_future_tokens: int = 1,
    max_seq_len: int = 16_384,
    vocab_size: int = 32_016,
    looped_heads: bool = False,
    head_init: str = "copies",
    attention: str = "sdpa",
) -> MTPDecoder:
    """CodeLlama-7b and -Instruct; CodeLlama-7b-Python with ``vocab_size=32000``.

    Args:
        num_future_tokens, max_seq_len, vocab_size, looped_heads, head_init, attention: as in :func:`llama_mtp`.
    """
    return llama_mtp(
        vocab_size=vocab_size,
        num_layers=32,
        **_WIDTHS_7B,
        max_seq_len=max_seq_len,
        num_future_tokens=num_future_tokens,
        rope_base=1_000_000,
        looped_heads=looped_heads,
        head_init=head_init,
        attention=attention,
    )


def from_checkpoint(
    path: str | Path,
    num_future_tokens: int | None = None,
    max_seq_len: int | None = None,
    looped_heads: bool | None = None,
    head_init: str = "copies",
    attention: str = "sdpa",
) -> MTPDecoder:
    """A model of any family of docs/models.md, of the shape that a checkpoint's config.json or params.json describes;
    its weights are not read here.

    Args:
        path: any form that :func:`~wmtp.pretrained.resolve_checkpoint` takes.
        num_future_tokens: H; by default as many heads as the checkpoint has.
        max_seq_len: by default the checkpoint's.
        looped_heads: by default as the checkpoint's; one without extra heads takes either.
        head_init, attention: as in :func:`llama_mtp`.

    Raises:
        CheckpointError: there is no such checkpoint, or it is of no such family.
    """
    folder = resolve_checkpoint(path)
    stored = read_shape(folder)
    shape = replace(
        stored,
        num_future_tokens=stored.num_future_tokens if num_future_tokens is None else num_future_tokens,
        max_seq_len=stored.max_seq_len if max_seq_len is None else max_seq_len,
        looped_heads=stored.looped_heads if looped_heads is None else looped_heads,
    )
    model = MTPDecoder(shape, attention=attention, head_init=head_init)
    model.source = read_source(folder, form_of(folder), stored.max_seq_len)
    return model


def require_fit(model: Any, max_token_id: int, seq_len: int, where: str = "model") -> None:
    """Raises UserError where a model has too few token ids for a data set, or is for shorter rows."""
    if model.vocab_size <= max_token_id:
        raise UserError(
            f"{where} has {model.vocab_size} token ids, the dataset uses id {max_token_id}; "
            "use the tokenizer of the model's checkpoint"
        )
    if seq_len > model.max_seq_len:
        raise UserError(f"seq_len {seq_len} is longer than {where}.max_seq_len {model.max_seq_len}")
