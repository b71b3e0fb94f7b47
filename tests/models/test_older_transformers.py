"""Exports, and what a folder says of BOS, as other releases of `transformers` read them in processes of their own."""

import json

import pytest
import torch
from older_transformers import RELEASES, become, release_folder
from processes import start
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from wmtp.models import export_hf, from_checkpoint, load_checkpoint
from wmtp.pretrained import hf_tokenizer

TOKENS = torch.randint(0, 67, (2, 24), generator=torch.Generator().manual_seed(2))
TEXT = "def f(x):\n    return x + 10\n"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 100_000.0}
MODELS = {
    "plain": {"rope_parameters": PLAIN},
    "tied": {"rope_parameters": PLAIN, "tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3},
    "llama3 tied": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
}
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}<|eot|>{% endfor %}"
# What a folder says of BOS: the class and flag in tokenizer_config.json, whether tokenizer.json has a post-processor
# with BOS; then whether a text gets it.
BOS = {
    "flag": ("LlamaTokenizerFast", True, False, True),
    "post-processor": ("PreTrainedTokenizerFast", None, True, True),
    "nothing": ("PreTrainedTokenizerFast", None, False, False),
    "default of the class": ("LlamaTokenizer", None, False, True),
    "flag against the default": ("LlamaTokenizerFast", False, False, False),
    "flag against the post-processor": ("LlamaTokenizerFast", False, True, False),
}


def write_tokenizer(folder, kind=None, flag=None, template=True):
    """A byte-level BPE with two end tokens: as `transformers` 5 saves it, or with a class and flag as 4 did."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>", "<|user|>", "<|eot|>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT * 9], trainers.BpeTrainer(vocab_size=275, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.decoder = decoders.ByteLevel()
    if template:
        backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens=["<|user|>", "<|eot|>"], chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    if kind is None:
        return
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": kind}
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    file.write_text(json.dumps(settings | ({} if flag is None else {"add_bos_token": flag})))
    if not template:
        whole = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(whole | {"post_processor": None}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders to read, by name, the models of MODELS, and the ids of TEXT that each tokenizer should give."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("folders")
    write_tokenizer(root / "tokenizer")
    tokenizer, trained = hf_tokenizer(root / "tokenizer"), {}
    for name, changes in MODELS.items():
        torch.manual_seed(0)
        sizes = {"vocab_size": 280, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        config = LlamaConfig(**sizes, initializer_range=0.2, eos_token_id=[3, 1], bos_token_id=0, **changes)
        source = root / f"source {name}"
        LlamaForCausalLM(config).save_pretrained(source)
        generation = {"eos_token_id": [3, 2], "bos_token_id": 0, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
        (source / "generation_config.json").write_text(json.dumps(generation))
        trained[name] = from_checkpoint(source, num_future_tokens=2, max_seq_len=24)
        load_checkpoint(trained[name], source)
        with torch.no_grad():
            trained[name].norm.scale.mul_(1.1)
        export_hf(trained[name], root / name, tokenizer_source=tokenizer)
    ids = {name: tokenizer.encode_prompt(TEXT) for name in MODELS}
    for name, (kind, flag, template, _) in BOS.items():
        write_tokenizer(root / f"in {name}", kind, flag, template)
        read = hf_tokenizer(root / f"in {name}")
        read.save(root / f"out {name}")
        ids |= dict.fromkeys((f"in {name}", f"out {name}"), read.encode_prompt(TEXT))
    return root, trained, ids


def read_with(release, root, models, tokenizers, out):
    """In a process of its own: what a release makes of each folder."""
    become(release)
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = {"version": transformers.__version__, "models": {}, "ids": {}}
    for name in models:
        model = AutoModelForCausalLM.from_pretrained(root / name)
        heads = AutoModelForCausalLM.from_pretrained(root / name, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(root / name)
        asked, drafting = tokenizer(TEXT, return_tensors="pt"), []
        note = lambda _, args, given, to=drafting: to.append(given.get("num_heads"))
        heads.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            found["models"][name] = {
                "logits": heads(TOKENS, num_heads=2).head_logits,
                "head 1": torch.equal(heads(TOKENS).logits, model(TOKENS).logits),
                "text": [m.generate(**asked, max_new_tokens=12, do_sample=False) for m in (model, heads)],
                "drafting": {*drafting[2:]},
                "length": model.generate(**asked, max_new_tokens=2, do_sample=False).shape[1],
                "ends": model.generation_config.eos_token_id,
                "temperature": model.generation_config.temperature,
                "config": model.config.to_dict(),
                "chat": tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False),
            }
    for name in tokenizers:
        found["ids"][name] = AutoTokenizer.from_pretrained(root / name).encode(TEXT)
    torch.save(found, out)


@pytest.mark.parametrize("version", RELEASES)
def test_other_releases_read_an_export_as_what_was_trained(folders, tmp_path, version):
    root, trained, ids = folders
    # 4.40 has no llama3 scaling, and cannot read what 5 or a newer `tokenizers` wrote; 5 reads 4's folders in a way of
    # its own: there the exports alone.
    models = [name for name in MODELS if version != "4.40.2" or "llama3" not in name]
    tokenizers = [name for name in ids if version == "4.57.3" or not name.startswith("in ")]
    out, log = tmp_path / "found.pt", tmp_path / "log"
    log.touch()
    start(read_with, release_folder(version), root, models, tokenizers, out, log=log).join(timeout=900)
    found = torch.load(out, weights_only=False)
    assert found["version"] == version
    for name in models:
        read = found["models"][name]
        with torch.no_grad():
            torch.testing.assert_close(read["logits"], trained[name](TOKENS), atol=1e-5, rtol=1e-5)
        assert read["head 1"] and torch.equal(*read["text"])
        assert read["drafting"] == {None if version == "4.40.2" else 2}  # which has no cache that can be cut
        assert read["ends"] == [3, 2, 1] and read["temperature"] == 0.6
        assert len(ids[name]) < read["length"] <= len(ids[name]) + 2
        assert read["config"]["eos_token_id"] == [3, 1] and read["config"]["bos_token_id"] == 0
        assert read["config"]["max_position_embeddings"] == 64
        assert read["chat"] == "<s><|user|>hi<|eot|>"
    assert found["ids"] == {name: ids[name] for name in tokenizers}


def test_bos_is_what_the_folder_says(folders):
    root, _, ids = folders
    for name, (*_, starts) in BOS.items():
        assert (ids[f"in {name}"][0] == 0) == starts, name
        assert AutoTokenizer.from_pretrained(root / f"out {name}").encode(TEXT) == ids[f"out {name}"], name
