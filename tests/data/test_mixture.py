"""Mixtures: shares of targets, each document once or again, the same documents in every process and from the cache."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from wmtp.config import ConfigError, build
from wmtp.config.components import check_keys
from wmtp.data import pack
from wmtp.pretrained import byte_tokenizer
from wmtp.training.packed_data import packed_data

BYTES = byte_tokenizer()


@pytest.fixture
def section(tmp_path):
    """A mixture of 20 long and 30 short documents, with overrides."""
    for name, count, length in (("long", 20, 19), ("short", 30, 4)):
        rows = [{"prompt": "p", "completion": chr(97 + i % 26) * length, "id": str(i)} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(**overrides):
        parts = {
            name: {"_component_": "wmtp.data.prompt_completion", "source": str(tmp_path / f"{name}.jsonl")}
            for name in ("long", "short")
        }
        return OmegaConf.create({"_component_": "wmtp.data.mixture", "parts": parts} | overrides)

    return made


def mixed(section):
    return build(section, BYTES, where="dataset")


def targets(documents, name):
    return sum(int((d.labels != -100).sum()) for d in documents if d.id.startswith(f"{name}/"))


def test_without_shares_every_document_is_there_once(section):
    documents = mixed(section())
    assert [d.id for d in documents] == [f"long/{i}" for i in range(20)] + [f"short/{i}" for i in range(30)]
    assert documents.name == (
        "mixture of long (20 of 20 documents, 72.7% of the targets), short (30 of 30 documents, 27.3% of the targets)"
    )


@pytest.mark.parametrize("shares", [{"long": 1, "short": 1}, {"long": 0.9, "short": 0.1}, {"long": 1, "short": 30}])
def test_shares_are_of_targets_and_no_document_is_there_twice(section, shares):
    documents = mixed(section(shares=shares))
    ids = [d.id for d in documents]
    assert len(set(ids)) == len(ids)
    assert sum(i.startswith("long/") for i in ids) == 20 or sum(i.startswith("short/") for i in ids) == 30
    wanted = shares["long"] / sum(shares.values()) * (targets(documents, "long") + targets(documents, "short"))
    assert abs(targets(documents, "long") - wanted) <= 20  # a document
    assert documents.fingerprint == mixed(section(shares=shares)).fingerprint


def test_all_exhausted_repeats_the_smaller_part(section):
    documents = mixed(section(shares={"long": 1, "short": 1}, stopping_strategy="all_exhausted"))
    ids = [d.id for d in documents]
    assert set(ids) == {f"long/{i}" for i in range(20)} | {f"short/{i}" for i in range(30)}
    assert targets(documents, "long") == targets(documents, "short") == 400
    counts = {ids.count(f"short/{i}") for i in range(30)}
    assert counts == {2, 3}


def test_another_seed_draws_others(section):
    one, other = (mixed(section(shares={"long": 1, "short": 9}, seed=seed)) for seed in (0, 1))
    assert len(one) == len(other) and one.fingerprint != other.fingerprint
    assert [d.id for d in one] == [d.id for d in one]


def test_weights_of_one_part_are_1_in_the_others(section, tmp_path):
    rows = (tmp_path / "short.jsonl").read_text().splitlines()
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(json.loads(row) | {"weight": 3}) + "\n" for row in rows))
    documents = mixed(section())
    assert documents.signals == ("weight",) and documents.must_read == ()
    packed = pack(documents, 32, pad_id=258)
    assert set(packed.signals["weight"].flatten().tolist()) == {0.0, 1.0, 3.0}
    counted = section()
    counted.parts.short.prompt_weight = 0.5
    assert mixed(counted).must_read == ("weight",)


def test_the_cache_knows_a_mixture_by_its_parts(section, tmp_path, capsys):
    def packed(cfg):
        rows = {"packed": True, "cache": str(tmp_path / "cache"), "workers": 2}
        return packed_data(cfg, BYTES, "dataset", 32, **rows)

    cfg = section(shares={"long": 1, "short": 1})
    plain = pack(mixed(cfg), 32, pad_id=BYTES.pad_id)
    assert packed(cfg).fingerprint == plain.fingerprint
    folders = lambda: {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    [first] = folders()
    assert packed(cfg).rows_sha256 == plain.rows_sha256 and folders() == {first}
    with (tmp_path / "short.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "p", "completion": "new"}) + "\n")
    assert packed(cfg).fingerprint != plain.fingerprint and len(folders()) == 2
    cfg.parts.long.prompt_weight = 0.5
    again = packed(cfg)
    assert len(folders()) == 3 and again.must_read == ("weight",)
    nested = OmegaConf.create({"_component_": "wmtp.data.mixture", "parts": {"both": section(), "more": section()}})
    packed(nested)
    packed(nested)
    assert len(folders()) == 4
    key = json.loads((tmp_path / "cache" / (folders() - {first}).pop() / "key.json").read_text())
    assert key["builder"] == "wmtp.data.mixing.mixture" and " at 0x" not in json.dumps(key)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"shares": {"long": 1}}, "shares says nothing of the part 'short'"),
        ({"shares": {"long": 1, "shrt": 1}}, "shares names 'shrt', which is none of the parts .*; did you mean"),
        ({"shares": {"long": 1, "short": 0}}, "shares.short must be a number > 0, got 0"),
        ({"shares": {"long": "a", "short": 1}}, "shares.long must be a number > 0, got 'a'"),
        (
            {"shares": {"long": 1e-6, "short": 1}, "stopping_strategy": "all_exhausted"},
            r"shares.short: .*short.jsonl would be there 2,666,\d+ times; give it a smaller share",
        ),
        ({"stopping_strategy": "never"}, "stopping_strategy must be one of .*, got 'never'"),
        ({"parts": {}}, "parts must name at least one data set"),
        ({"parts": {"a": {"source": "x"}}}, "parts.a must be a section with the _component_"),
        ({"parts": {"a": {"_component_": "wmtp.data.chatt"}}}, "_component_ 'wmtp.data.chatt' cannot be"),
        ({"parts": {"a": {"_component_": "wmtp.data.text", "sorce": "x"}}}, "'sorce' in dataset.parts.a; did you mean"),
        ({"parts": {"a": {"_component_": "wmtp.data.text"}}}, r"parts.a .* lacks the key\(s\) source"),
        ({"parts": {"a": {"_component_": "wmtp.data.text", "source": "no.jsonl"}}}, "no.jsonl does not exist"),
        ({"parts": {"a": {"_component_": "wmtp.data.python_functions", "split": "x"}}}, "split must be"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
    ],
)  # fmt: skip
def test_a_wrong_mixture_is_one_line(section, overrides, message):
    cfg = section()
    for key, value in overrides.items():
        OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises((ConfigError, ValueError), match=message) as error:
        mixed(cfg)
    assert "\n" not in str(error.value)


def test_the_keys_of_parts_are_checked_before_anything_is_built(section):
    cfg = section()
    check_keys(cfg, "dataset")
    cfg.parts.long.sorce = "x"
    with pytest.raises(ConfigError, match=r"'sorce' in dataset\.parts\.long"):
        check_keys(cfg, "dataset")


def test_a_part_drawn_whole_keeps_its_order():
    from wmtp.data.mixing import _drawn

    counts = np.array([3, 1, 4, 1, 5])
    order = np.array([4, 2, 0, 1, 3])
    assert _drawn(counts, 14.0, order).tolist() == [0, 1, 2, 3, 4]
    assert _drawn(counts, 9.0, order).tolist() == [2, 4]
    assert _drawn(counts, 28.0 - 1e-9, order).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert _drawn(counts, 0.1, order).tolist() == [4]  # a share is never nothing
