"""Chat templates in the formats that model families publish, written for these tests, and tokenizers that fit them.

Each marks the assistant's turns by {% generation %}; `unmarked` takes the marks away, as most published templates lack
them. A family's tokenizer is a real one with the family's control tokens added.
"""

import inspect
import json
import random
import re
import textwrap
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer as Backend
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from wmtp.pretrained.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parent / "chat_templates"
# Family: kind of tokenizer, BOS, EOS, further control tokens.
_HEADERS = ["<|start_header_id|>", "<|end_header_id|>"]
_DEEPSEEK = (
    "bpe_3",
    *(f"<\uff5c{name}\uff5c>" for name in ("begin\u2581of\u2581sentence", "end\u2581of\u2581sentence")),
)
_SPEAKERS = ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"]
FAMILIES = {
    "llama_2": ("sentencepiece", "<s>", "</s>", []),
    "llama_3": ("bpe_3", "<|begin_of_text|>", "<|eot_id|>", _HEADERS),
    "llama_3_2": ("bpe_3", "<|begin_of_text|>", "<|eot_id|>", _HEADERS),
    "chatml": ("bpe_2", "<|im_start|>", "<|im_end|>", []),
    "qwen_2_5": ("bpe_3", None, "<|im_end|>", ["<|im_start|>"]),
    "mistral": ("sentencepiece", "<s>", "</s>", []),
    "gemma": ("sentencepiece", "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "phi_3": ("sentencepiece", "<s>", "<|endoftext|>", ["<|user|>", "<|system|>", "<|assistant|>", "<|end|>"]),
    "zephyr": ("sentencepiece", "<s>", "</s>", []),
    "deepseek": (*_DEEPSEEK, _SPEAKERS),
    "granite": ("bpe_2", "<|end_of_text|>", "<|end_of_text|>", ["<|start_of_role|>", "<|end_of_role|>"]),
    "olmo_2": ("bpe_3", "<|endoftext|>", "<|endoftext|>", []),
    "vicuna": ("sentencepiece", "<s>", "</s>", []),
    "alpaca": ("bpe_2", None, "<|endoftext|>", []),
    # What follows rewrites earlier turns, and is refused.
    "qwen_3": ("bpe_3", None, "<|im_end|>", ["<|im_start|>", "<think>", "</think>"]),
    "deepseek_r1": (*_DEEPSEEK, _SPEAKERS),
    "last_two": ("bpe_2", "<|im_start|>", "<|im_end|>", []),
}
# Of Llama 3, with which Qwen's, DeepSeek's and OLMo 2's tokenizers also split a text before they merge bytes.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def template(family: str, *, marked: bool = False) -> str:
    text = (TEMPLATES / f"{family}.jinja").read_text()
    return text if marked else re.sub(r"{% (end)?generation %}", "", text)


def backends(smollm2, folder) -> dict[str, str]:
    """The serialized backends of the kinds that families use: two of SmolLM2's first merges, one of SentencePiece's."""
    whole = json.loads(smollm2.backend_tokenizer.to_str())
    # The first merges of a vocabulary are one themselves, and quicker to read.
    kept = {token: i for token, i in whole["model"]["vocab"].items() if i < 6000}
    merges = [pair for pair in whole["model"]["merges"] if "".join(pair) in kept and set(pair) <= kept.keys()]
    two = {**whole, "model": {**whole["model"], "vocab": kept, "merges": merges}}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    three = {**two, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}}
    code = inspect.getsource(textwrap) + inspect.getsource(random)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(code.split("\n\n")), model_prefix=str(folder / "tokenizer"), vocab_size=600,
        model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        allow_whitespace_only_pieces=True, remove_extra_whitespaces=False, minloglevel=2, max_sentence_length=100_000,
    )  # fmt: skip
    llama = LlamaTokenizer.from_pretrained(folder, local_files_only=True)
    return {
        "bpe_2": json.dumps(two),
        "bpe_3": json.dumps(three),
        "sentencepiece": llama.backend_tokenizer.to_str(),
    }


def family_tokenizer(kinds: dict[str, str], family: str, *, marked: bool = False) -> Tokenizer:
    kind, bos, eos, others = FAMILIES[family]
    hf = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(kinds[kind]), bos_token=bos, eos_token=eos, extra_special_tokens=others,
        chat_template=template(family, marked=marked),
    )  # fmt: skip
    return Tokenizer(hf, name=family)
