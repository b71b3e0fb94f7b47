"""Tokenizers: exact on code for byte-level BPE and SentencePiece, offline, and compared by value."""

import inspect
import json
import random
import textwrap

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from wmtp.pretrained import byte_tokenizer, hf_tokenizer, require_same_vocabulary

CODE = inspect.getsource(textwrap) + inspect.getsource(random)
HOSTILE = [
    "  a",
    "a  ",
    "\n    x",
    "\t\ty = 1\r\n",
    " ",
    "   ",
    "",
    "x = '</s>'  # <s> <|endoftext|> <0x0A>",
    "é漢😀\x0c",
]


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    """A tokenizer.model trained with Llama's settings, and nothing else in the folder."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE.split("\n\n")), model_prefix=str(folder / "tokenizer"), vocab_size=600,
        model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        allow_whitespace_only_pieces=True, remove_extra_whitespaces=False, minloglevel=2, max_sentence_length=100_000,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    """A byte-level BPE in GPT-2's manner, with a prefix space and truncation left on in its file."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([CODE], trainer)
    backend.decoder = decoders.ByteLevel()
    backend.enable_truncation(8)
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture(params=["bytes", "bpe", "sentencepiece", "llama_json"])
def tokenizer(request, sentencepiece_folder, bpe_folder, tmp_path):
    if request.param == "bytes":
        return byte_tokenizer()
    if request.param == "llama_json":  # with Llama's prefix space, as its HF folders have it
        LlamaTokenizer.from_pretrained(sentencepiece_folder, local_files_only=True).save_pretrained(tmp_path)
        return hf_tokenizer(tmp_path)
    return hf_tokenizer({"bpe": bpe_folder, "sentencepiece": sentencepiece_folder}[request.param])


def test_pieces_of_code_join_without_loss(tokenizer):
    rng = random.Random(0)
    cuts = [rng.randrange(len(CODE)) for _ in range(50)]
    pairs = [(CODE[cut - 60 : cut], CODE[cut : cut + 60]) for cut in cuts]
    for a, b in [*pairs, *((x, y) for x in HOSTILE for y in HOSTILE)]:
        assert tokenizer.decode(tokenizer.encode(a) + tokenizer.encode(b)) == a + b


def test_special_tokens_written_in_a_text_stay_text(tokenizer):
    specials = {i for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if i is not None}
    for text in ("<s></s>", "<|endoftext|>", "<eos><pad>"):
        assert not specials & set(tokenizer.encode(text))


def test_saved_and_read_again_it_is_the_same(tokenizer, tmp_path):
    folder = tmp_path / "saved"
    tokenizer.save(folder)
    again = hf_tokenizer(folder)
    require_same_vocabulary(tokenizer, again)
    assert again.vocab_hash() == tokenizer.vocab_hash()
    assert again.encode_prompt(CODE) == tokenizer.encode_prompt(CODE)
    for name in ("bos_id", "eos_id", "pad_id", "vocab_size", "add_bos"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == tokenizer.eos_id
    assert "local_files_only" not in (folder / "tokenizer_config.json").read_text()


def test_sentencepiece_ids_are_those_of_sentencepiece_without_its_prefix_space(sentencepiece_folder):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((sentencepiece_folder / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    outside = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    tokenizer = hf_tokenizer(sentencepiece_folder)
    for text in [*CODE.split("\n\n"), *(text for text in HOSTILE if "<" not in text)]:
        assert tokenizer.encode(text) == outside.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 600)
    assert tokenizer.pad_id == tokenizer.eos_id


def test_a_llama_prompt_starts_with_bos_and_the_config_can_say_otherwise(sentencepiece_folder):
    assert hf_tokenizer(sentencepiece_folder).encode_prompt("x")[0] == 1
    assert hf_tokenizer(sentencepiece_folder, add_bos=False).encode_prompt("x")[0] != 1
    assert byte_tokenizer().encode_prompt("x") == [ord("x")]


@pytest.mark.parametrize("settings", [{"add_bos_token": True}, {"add_bos_token": False}, {"legacy": False}], ids=str)
def test_a_llama_folders_settings_say_whether_a_text_starts_with_bos(sentencepiece_folder, tmp_path, settings):
    """As `transformers` has it: with its space before the text, the ids are the same."""
    bos = settings.get("add_bos_token", True)
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        **settings,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    outside = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=bos)  # 5 has no default of 4's left
    tokenizer = hf_tokenizer(tmp_path)
    for text in [part for part in CODE.split("\n\n") if part[:1].isalpha()]:
        assert tokenizer.encode_prompt(f" {text}") == outside.encode(text)
    assert (tokenizer.encode_prompt("x")[0] == 1) == tokenizer.add_bos == bos
    tokenizer.save(tmp_path / "saved")
    # What training saw, without that space, is what an export's tokenizer gives.
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode(CODE) == tokenizer.encode_prompt(CODE)
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == (tmp_path / "tokenizer.model").read_bytes()


def test_meta_keeps_its_tokenizer_above_the_checkpoint_folder(sentencepiece_folder):
    checkpoint = sentencepiece_folder / "7B_200B_4"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "params.json").write_text("{}")
    assert hf_tokenizer(checkpoint).vocab_hash() == hf_tokenizer(sentencepiece_folder).vocab_hash()
    assert hf_tokenizer(checkpoint / "params.json").vocab_size == 600


def test_code_llama_settings_add_no_ids_that_the_file_does_not_have(sentencepiece_folder, tmp_path):
    hf_tokenizer(sentencepiece_folder).save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "CodeLlamaTokenizer"}))
    require_same_vocabulary(hf_tokenizer(sentencepiece_folder), hf_tokenizer(tmp_path))
    assert hf_tokenizer(tmp_path).vocab_size == 600


def test_bytes_are_their_own_ids():
    tokenizer = byte_tokenizer()
    every_character = "".join(map(chr, range(0x250))) + "漢😀"
    assert tokenizer.encode(every_character) == list(every_character.encode())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (256, 257, 258, 259)


def test_wheel_and_gguf_paths_are_resolved_by_the_models(sentencepiece_folder, monkeypatch):
    monkeypatch.setattr("wmtp.pretrained.tokenizer.resolve_checkpoint", lambda path: sentencepiece_folder)
    for path in ("wheel:anything", "some/model.gguf"):
        assert hf_tokenizer(path).vocab_size == 600


def test_different_vocabularies_are_refused_by_the_first_id(sentencepiece_folder, bpe_folder, tmp_path):
    ours = hf_tokenizer(sentencepiece_folder)
    with pytest.raises(
        ValueError, match=r"checked by value: id 0 is '<unk>' in .* \(600 ids\) and '<\|endoftext\|>' in"
    ):
        require_same_vocabulary(ours, hf_tokenizer(bpe_folder))
    ours.save(tmp_path)
    longer = json.loads((tmp_path / "tokenizer.json").read_text())
    longer["added_tokens"].append({**longer["added_tokens"][0], "id": 600, "content": "<new>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(longer))
    with pytest.raises(ValueError, match=r"id 600 is absent in .* \(600 ids\) and '<new>' in .* \(601 ids\)"):
        require_same_vocabulary(ours, hf_tokenizer(tmp_path))


def test_chat_template(tmp_path):
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="byte_tokenizer has no chat template"):
        tokenizer.chat.prompt([{"role": "user", "content": "hi"}])
    tokenizer.save(tmp_path)
    template = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    template += "{% if add_generation_prompt %}>{% endif %}"
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    ids = hf_tokenizer(tmp_path).chat.prompt([{"role": "user", "content": "hi"}])
    assert ids == [256, *b"user: hi", 257, *b">"]


def test_what_is_no_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        hf_tokenizer(tmp_path / "absent")
    folder = tmp_path / "outer" / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    with pytest.raises(
        FileNotFoundError, match=r"neither tokenizer.json nor tokenizer.model; it holds model.safetensors"
    ):
        hf_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(ValueError, match="cannot be read"):
        hf_tokenizer(folder)
    byte_tokenizer().save(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="names no EOS token; set eos_token"):
        hf_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    with pytest.raises(ValueError, match="names no BOS token"):
        hf_tokenizer(folder, add_bos=True)
