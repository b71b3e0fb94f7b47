"""A decoder with parallel multi-token-prediction heads, in Meta's layout, of any family in wmtp.pretrained.families.

    tok_embeddings -> layers[0] .. layers[-2] -+-> layers[-1]      -> norm -> unembedding    head 1, the next token
                                               +-> extra_heads[0]  -> norm -> unembedding    head 2
                                               +-> extra_heads[j]  -> norm -> unembedding    head j + 2

Every head is one full transformer block on the same trunk state; norm and unembedding are shared (Gloeckle et al. 2024,
arXiv 2404.19737, section 2). With H = 1 this is an ordinary decoder. `wmtp.generation` decodes with cached keys and
values, over the same modules.

With looped heads there is one extra block for all of heads 2 to H, which runs in rounds: head 2 reads its output on the
trunk state, head k + 1 its output on its own output for head k. The idea is FastMTP's (arXiv 2509.18362), whose block
also reads, in each round, the embedding of the token before the one to predict; this one sees what the trunk saw alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmtp.errors import UserError
from wmtp.models.block import Block, RMSNorm
from wmtp.models.masks import block_mask, dense_mask, document_mask
from wmtp.models.new_heads import HEAD_INITS, start_value
from wmtp.models.rope import RoPE
from wmtp.numerics.documents import positions_in_documents
from wmtp.numerics.fork import fork
from wmtp.numerics.products import on_cuda
from wmtp.pretrained.config_files import Source
from wmtp.pretrained.shape import DecoderShape


class MTPDecoder(nn.Module):
    """A trunk, H parallel heads, and a norm and unembedding that they share.

    Args:
        config: the model's sizes; kept as ``model.config`` and written by the export.
        attention: ``sdpa``, or ``flex`` (CUDA only), which skips blocks of the mask that are empty.
        head_init: how extra heads start that no checkpoint gives, see :mod:`wmtp.models.new_heads`.
    """

    def __init__(self, config: DecoderShape, *, attention: str = "sdpa", head_init: str = "copies") -> None:
        super().__init__()
        if attention not in ("sdpa", "flex"):
            raise UserError(f"attention must be 'sdpa' or 'flex', got {attention!r}")
        if head_init not in HEAD_INITS:
            raise UserError(f"head_init must be one of {', '.join(HEAD_INITS)}, got {head_init!r}")
        self.config, self.head_init = config, head_init
        self.num_future_tokens, self.vocab_size = config.num_future_tokens, config.vocab_size
        self.embed_dim, self.max_seq_len = config.embed_dim, config.max_seq_len
        self.num_new_heads = 0  # blocks of extra heads that its checkpoint lacked
        self.source: Source | None = None  # facts from the files of the checkpoint that it is built or read from
        self.attention = attention
        # One module for all blocks of a kind, so its cache exists once.
        self.rope = local = RoPE(config, config.rope_base, config.rope_scaling)
        if config.local_rope_base is not None:
            self.local_rope = local = RoPE(config, config.local_rope_base, None)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.embed_dim)
        blocks = [Block(config, local if slides else self.rope, slides) for slides in config.slides]
        self.layers = nn.ModuleList(blocks[: config.num_layers])
        self.extra_heads = nn.ModuleList(blocks[config.num_layers :])
        # The logits' division is part of the last norm: logits, losses and cached decoding all read what it gives.
        self.norm = RMSNorm(
            config.embed_dim, eps=config.norm_eps, offset=config.norm_offset, multiplier=1 / config.logits_scaling
        )
        if not config.tie_word_embeddings:
            self.output = Unembedding(config.embed_dim, config.vocab_size, bias=False)
        if not self.tok_embeddings.weight.is_meta:
            self.init_weights()

    @property
    def unembedding(self) -> Tensor:
        """Returns the unembedding [V, D]: a tied model's embedding. FSDP2 has it whole only in the forward pass."""
        return self.tok_embeddings.weight if self.config.tie_word_embeddings else self.output.weight

    @property
    def heads(self) -> list[nn.Module]:
        """Returns the block of each head, 1 to H; looped heads share one."""
        rounds = self.num_future_tokens - 1 if self.config.looped_heads else 1
        return [self.layers[-1], *list(self.extra_heads) * rounds]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws weights from a normal with standard deviation 0.02, and sets norms to one and biases to zero; with
        ``head_init`` zero_residual, extra heads as that says. Call it before sharding."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.scale"):
                parameter.fill_(0.0 if self.config.norm_offset else 1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=0.02)
            if (value := start_value(name, self)) is not None:
                parameter.fill_(value)

    def reset_rope(self, device: torch.device | str | None = None) -> None:
        """Computes the RoPE cache anew, in float32, on ``device`` (by default its own)."""
        device = torch.device(self.rope.cache.device if device is None else device)
        if device.type != "meta":
            with device:
                for rope in {self.rope, getattr(self, "local_rope", self.rope)}:
                    rope.rope_init()

    def _apply(self, fn: Callable, recurse: bool = True) -> "MTPDecoder":
        # to_empty() would leave the rotation angles undefined and to(bfloat16) would round them; both pass here.
        super()._apply(fn, recurse)
        self.reset_rope()
        return self

    # ------------------------------------------------------------------------------------------------------------------
    # Forward

    def forward(
        self,
        tokens: Tensor,
        *,
        document_ids: Tensor | None = None,
        input_pos: Tensor | None = None,
        mask: Any = None,
        num_heads: int | None = None,
        trunk_state: Tensor | None = None,
        return_trunk: bool = False,
        trunk_gradient: Sequence[float] | None = None,
        agreement: Tensor | None = None,
        loss_fn: Callable | None = None,
        **loss_inputs: Any,
    ) -> Any:
        """Computes the logits of every head, or the result of ``loss_fn`` on the hidden states.

        Args:
            tokens: [B, S] token ids.
            document_ids: [B, S] integers that differ between the documents of a row, -1 for padding; attention and
                positions stop at a document's edge. None where each row is one document.
            input_pos: [B, S] positions; by default counted from each document's start.
            mask: [B, S, S] bool, True where a query may look, inside the window of a block that has one; by default
                causal within documents.
            num_heads: compute only the first heads; by default all H.
            trunk_state: [B, S, D], the result of ``return_trunk`` for these tokens: the trunk does not run again.
            return_trunk: return the trunk's state [B, S, D], which all heads read, and compute no head.
            trunk_gradient: a factor for each head of the gradient that it gives to what all heads use: trunk and norm
                here, and the unembedding, as an argument of ``loss_fn``. By default 1. Looped heads have one for all.
            agreement: [2, H] (looped heads: [2, 2], as they give the trunk one gradient), to which the backward pass
                adds, see :func:`wmtp.numerics.fork.fork`.
            loss_fn: called as ``loss_fn(hidden, unembedding, document_ids=document_ids, **loss_inputs)``.

        Returns:
            logits [H, B, S, V] in the computation's dtype (like those of `transformers`; cross-entropies and decoding
            use float32, see wmtp.numerics.products), the trunk's state, or the result of ``loss_fn``.
        """
        if return_trunk:
            return self._run_trunk(tokens, *self._attention_inputs(tokens, document_ids, input_pos, mask))
        hidden = self.hidden_states(
            tokens,
            document_ids=document_ids,
            input_pos=input_pos,
            mask=mask,
            num_heads=num_heads,
            trunk_state=trunk_state,
            trunk_gradient=trunk_gradient,
            agreement=agreement,
        )
        if trunk_gradient is not None and loss_fn is not None:
            loss_inputs["trunk_gradient"] = trunk_gradient
        if self.config.tie_word_embeddings:
            return _unembed(hidden, self.unembedding, loss_fn, document_ids=document_ids, **loss_inputs)
        return self.output(hidden, loss_fn, document_ids=document_ids, **loss_inputs)

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        document_ids: Tensor | None = None,
        input_pos: Tensor | None = None,
        mask: Any = None,
        num_heads: int | None = None,
        trunk_state: Tensor | None = None,
        trunk_gradient: Sequence[float] | None = None,
        agreement: Tensor | None = None,
    ) -> Tensor:
        """Computes the normed states of the heads, [H, B, S, D]; arguments as in :meth:`forward`.

        With FSDP2, call forward with a ``loss_fn`` that returns them: only forward gathers weights.
        """
        if num_heads is not None and not 1 <= num_heads <= self.num_future_tokens:
            raise UserError(f"num_heads must be between 1 and the model's {self.num_future_tokens}, got {num_heads}")
        masks, input_pos = self._attention_inputs(tokens, document_ids, input_pos, mask)
        h = self._run_trunk(tokens, masks, input_pos) if trunk_state is None else trunk_state.to(self.norm.scale.dtype)
        heads, looped = self.heads[:num_heads], self.config.looped_heads
        factors = (1.0,) * len(heads) if trunk_gradient is None else trunk_gradient
        states = fork(h, factors[:2] if looped else factors, agreement)
        outs: list[Tensor] = []
        for k, block in enumerate(heads):
            state = outs[-1] if looped and k > 1 else states[k]
            outs.append(block(state, mask=masks[block.slides], input_pos=input_pos))
        return torch.stack([self.norm(out, factor) for out, factor in zip(outs, factors, strict=True)])

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns what the first block reads: [..., D] for token ids [...]."""
        h, multiplier = self.tok_embeddings(tokens), self.config.embedding_multiplier
        # Rounded to the states' dtype first: Gemma was trained so.
        return h if multiplier == 1 else h * torch.full((), multiplier, dtype=h.dtype, device=h.device)

    def _run_trunk(self, tokens: Tensor, masks: tuple[Any, Any], input_pos: Tensor | None) -> Tensor:
        h = self.embed(tokens)  # [B, S, D]
        for block in self.layers[:-1]:
            h = block(h, mask=masks[block.slides], input_pos=input_pos)
        return h

    def _attention_inputs(
        self, tokens: Tensor, document_ids: Tensor | None, input_pos: Tensor | None, mask: Tensor | None
    ) -> tuple[tuple[Any, Any], Tensor | None]:
        """Returns the masks of blocks without and with the sliding window, and the positions; None is plain causal."""
        if tokens.shape[1] > self.max_seq_len:
            raise UserError(f"the sequence length must be <= max_seq_len {self.max_seq_len}, got {tokens.shape[1]}")
        window = self.config.sliding_window
        narrow = any(self.config.slides) and tokens.shape[1] > (window or 0)  # else no window ends inside the row
        if mask is not None:
            near = mask & dense_mask(torch.zeros_like(tokens), window) if narrow else mask
            return (mask, near), input_pos
        # Rows of one document take the causal path, without a mask. On CUDA this test would wait for the device.
        plain = self.attention == "sdpa" and (
            document_ids is None or (not on_cuda(document_ids) and bool((document_ids == document_ids[:, :1]).all()))
        )
        if plain and not narrow:
            return (None, None), input_pos
        if self.attention == "flex" and not on_cuda(tokens):
            raise UserError(f"attention 'flex' needs CUDA, got tokens on {tokens.device}; use attention 'sdpa'")
        if document_ids is None:
            document_ids = torch.zeros_like(tokens)
        if input_pos is None:
            input_pos = positions_in_documents(document_ids)
        if self.attention == "flex":
            build = block_mask
        else:  # a document at a time would make the host wait for CUDA
            build = dense_mask if plain or on_cuda(tokens) else partial(document_mask, width=self.embed_dim)
        whole = None if plain or (narrow and all(self.config.slides)) else build(document_ids)
        return (whole, build(document_ids, window) if narrow else whole), input_pos


class Unembedding(nn.Linear):
    """The matrix [V, D] that is a module of its own, so that FSDP2 gathers it for the loss and for nothing else."""

    def forward(self, input: Tensor, loss_fn: Callable | None = None, **loss_inputs: Any) -> Any:
        return _unembed(input, self.weight, loss_fn, **loss_inputs)


def _unembed(hidden: Tensor, unembedding: Tensor, loss_fn: Callable | None, **loss_inputs: Any) -> Any:
    # The loss runs here, and not on the forward's result, because here FSDP2 has the unembedding unsharded: in a group
    # of its own, or a tied one in the root's. The fused loss multiplies by it chunk by chunk and returns its gradient
    # whole.
    return F.linear(hidden, unembedding) if loss_fn is None else loss_fn(hidden, unembedding, **loss_inputs)
