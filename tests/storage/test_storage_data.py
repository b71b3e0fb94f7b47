"""Data on S3: the documents of the same files, whichever builder reads them."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from wmtp.config import build
from wmtp.pretrained import byte_tokenizer
from wmtp.training.packed_data import packed_data

CHATML = Path(__file__).parents[1] / "data" / "chat_templates" / "chatml.jinja"
TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4 é", "weight": 3.0}]


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(*rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


def test_chats_instructions_texts_and_a_mixture_are_read_from_a_bucket(bucket, tmp_path):
    rows = {
        "chat/train.parquet": parquet(*[{"messages": TURNS}] * 3),
        "questions.jsonl": jsonl({"instruction": "Say hi.", "output": "Hi", "weight": 2}),
        "texts/train.jsonl.gz": gzip.compress(jsonl({"text": "a" * 50}, {"text": "é" * 9})),
        "chatml.jinja": CHATML.read_bytes(),
    }
    for name, body in rows.items():
        bucket.put(name, body)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(body)

    def mixture(root):
        parts = {
            "chat": {"_component_": "wmtp.data.chat", "source": f"{root}/chat", "split": "train"},
            "instruct": {"_component_": "wmtp.data.instruct", "source": f"{root}/questions.jsonl"},
            "text": {"_component_": "wmtp.data.text", "source": f"{root}/texts", "split": "train", "piece_len": 16},
        }
        section = OmegaConf.create({"_component_": "wmtp.data.mixture", "parts": parts})
        return section, byte_tokenizer(chat_template=f"{root}/chatml.jinja")

    section, tokenizer = mixture(bucket.uri)
    remote, local = build(section, tokenizer, where="dataset"), build(*mixture(tmp_path), where="dataset")
    assert remote.fingerprint == local.fingerprint and remote.signals == ("weight",)
    options = {"packed": True, "cache": str(tmp_path / "data_cache"), "workers": 1}
    packed = packed_data(section, tokenizer, "dataset", 64, **options)
    assert packed.fingerprint == packed_data(mixture(tmp_path)[0], tokenizer, "dataset", 64, **options).fingerprint
    section.parts.chat.source = f"{bucket.uri}/chats"
    with pytest.raises(ValueError, match=rf"{bucket.uri}/chats.* does not exist"):
        build(section, tokenizer, where="dataset")
