"""Bytes of keys and values: what decoding holds beside the weights, and how many rows a budget admits.

A prompt's keys and values are there once for all rows that continue it; a row has its own for new tokens alone. Caches
are rectangles, [rows, positions]: prompts as long as the longest, rows as long as an answer may become. So rows in
flight hold

    (prompts x longest prompt + rows x (max_new_tokens + num_drafts)) x kv_bytes_per_token

with lengths rounded up to ``GROWTH``, and a request is admitted when that, with it, is at most the budget
(``kv_memory``). Answers count with their full length from the start: no row is ever thrown out for want of memory.
"""

import os

import psutil
import torch

from wmtp.errors import UserError
from wmtp.models.decoder import MTPDecoder

GROWTH = 128  # positions by which a cache grows
FREE_SHARE = 0.75  # of free memory; the rest is for activations, logits, and a block's cache that is there twice


def kv_bytes_per_token(model: MTPDecoder, num_drafts: int = 0) -> int:
    """Returns the bytes of a token's keys and values in all blocks of the trunk, head 1 and the drafting heads.

    Args:
        model: in the dtype of the computation; on any device, meta too.
        num_drafts: extra heads that decode; each has keys and values of its own.
    """
    shape, blocks = model.config, len(model.layers) + num_drafts
    numbers = 2 * shape.num_kv_heads * (shape.head_dim or shape.embed_dim // shape.num_heads)
    return blocks * numbers * model.tok_embeddings.weight.element_size()


def kv_positions(prompts: int, longest_prompt: int, rows: int, max_new_tokens: int, num_drafts: int = 0) -> int:
    """Returns the tokens that caches have room for: of so many different prompts, and of rows that continue them."""
    return prompts * rounded(longest_prompt) + rows * rounded(max_new_tokens + num_drafts)


def rows_within(
    kv_memory: int, model: MTPDecoder, longest_prompt: int, max_new_tokens: int, *, num_drafts: int = 0
) -> int:
    """Returns how many samples of one prompt a budget decodes at once; 0 if not even one."""
    left = kv_memory // kv_bytes_per_token(model, num_drafts) - kv_positions(1, longest_prompt, 0, 0)
    return max(left // kv_positions(0, 0, 1, max_new_tokens, num_drafts), 0)


def free_kv_memory(device: torch.device) -> int:
    """Returns the budget where none is given: ``FREE_SHARE`` of what is free on the device, for this process.

    On a CPU, processes of one host (``LOCAL_WORLD_SIZE``) share what is available.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(FREE_SHARE * (torch.cuda.mem_get_info(device)[0] + unused))
    return int(FREE_SHARE * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def check_kv_memory(
    kv_memory: int, model: MTPDecoder, longest_prompt: int, max_new_tokens: int, *, num_drafts: int = 0, name: str
) -> None:
    """Refuses a prompt of which a budget decodes not even one row.

    Args:
        name: says whose prompt it is.

    Raises:
        UserError: with the bytes that it would take.
    """
    if rows_within(kv_memory, model, longest_prompt, max_new_tokens, num_drafts=num_drafts):
        return
    positions = kv_positions(1, longest_prompt, 1, max_new_tokens, num_drafts)
    raise UserError(
        f"{name} has {longest_prompt} tokens, which with {max_new_tokens} new ones take "
        f"{positions * kv_bytes_per_token(model, num_drafts) / 1e9:.3g} GB of keys and values, and kv_memory is "
        f"{kv_memory / 1e9:.3g} GB; raise it, lower max_new_tokens, or use a shorter prompt"
    )


def rounded(length: int) -> int:
    """Returns a length in whole steps of ``GROWTH``."""
    return -(-length // GROWTH) * GROWTH
