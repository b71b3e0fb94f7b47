"""Rows admitted by their bytes of keys and values."""

import pytest
import torch

from wmtp.generation.kv_memory import check_kv_memory, free_kv_memory, kv_bytes_per_token, kv_positions, rows_within
from wmtp.models import codellama_7b, meta_mtp_7b


def seven_billion(builder):
    with torch.device("meta"):
        return builder().to(torch.bfloat16)


def test_the_bytes_of_a_token_are_those_of_every_block_that_decodes():
    """Meta's 29 blocks to head 1, CodeLlama's 32; two of 32 x 128 bfloat16 numbers in each."""
    meta, codellama = seven_billion(meta_mtp_7b), seven_billion(codellama_7b)
    assert kv_bytes_per_token(meta) == 29 * 2 * 32 * 128 * 2 and kv_bytes_per_token(meta, 3) == 32 * 2 * 32 * 128 * 2
    assert kv_bytes_per_token(codellama) == 32 * 2 * 32 * 128 * 2


def test_a_budget_admits_as_many_rows_as_their_answers_take_beside_their_prompt():
    model = seven_billion(meta_mtp_7b)
    positions = kv_positions(1, 4600, 64, 512)
    assert positions == 4608 + 64 * 512
    bytes_of_64 = positions * kv_bytes_per_token(model)
    assert bytes_of_64 < 18e9  # 156 GB with a prompt in every row
    assert rows_within(bytes_of_64, model, 4600, 512) == 64
    assert rows_within(bytes_of_64 - 1, model, 4600, 512) == 63
    one_row = kv_positions(1, 4600, 1, 512, 3) * kv_bytes_per_token(model, 3)
    check_kv_memory(one_row, model, 4600, 512, num_drafts=3, name="it")
    with pytest.raises(ValueError, match=r"it has 4600 tokens, which with 512 new ones take 2\.75 GB .* is 2\.75 GB; "):
        check_kv_memory(one_row - 1, model, 4600, 512, num_drafts=3, name="it")
    assert rows_within(1, model, 4600, 512) == 0


def test_what_is_free_is_shared_by_the_processes_of_a_host(monkeypatch):
    alone = free_kv_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < free_kv_memory(torch.device("cpu")) < alone / 2
