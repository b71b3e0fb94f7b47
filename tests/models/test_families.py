"""Every family of models computes, trains, exports, adapts and decodes as `transformers`' own classes do."""

import functools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_parity import CHECKS, FAMILIES, LLAMA3, TOKENS, WINDOW, YARN, case_of, hf_logits, near, write_case

from wmtp.errors import UserError
from wmtp.generation.cached_decoder import CachedDecoder, Prompts
from wmtp.models import MTPDecoder, add_lora, export_hf, from_checkpoint, load_checkpoint
from wmtp.models.masks import block_mask, dense_mask
from wmtp.pretrained import CheckpointError, read_shape
from wmtp.pretrained.families import FAMILIES as TABLE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_that_of_transformers(name, check):
    CHECKS[check](case_of(name))


def test_every_family_is_checked_and_the_page_says_so():
    assert {kind for kind, _ in FAMILIES.values()} == set(TABLE)
    sys.path.insert(0, str(ROOT / "docs"))
    import make_models

    every = {(name, check): None for name in FAMILIES for check in CHECKS}
    assert (ROOT / "docs" / "models.md").read_text() == make_models.page(every), "python docs/make_models.py"


ROPES = {
    "plain": ("qwen3", {"rope_type": "default", "rope_theta": 5e5}),
    "linear": ("mistral", {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    "dynamic": ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
    "yarn": ("qwen2", YARN),
    "yarn with all its keys": (
        "qwen3",
        {**YARN, "attention_factor": 0.7, "beta_fast": 4.0, "beta_slow": 2.0, "truncate": False, "rope_theta": 500.0},
    ),
    "yarn of a length in which nothing turns": ("mistral", {**YARN, "beta_fast": 1.0, "beta_slow": 32.0}),
    "llama3": ("granite", LLAMA3),
    "two bases": (
        "gemma3_text",
        {
            "full_attention": {"rope_type": "linear", "rope_theta": 3e5, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROPES)
def test_each_kind_of_rope_gives_the_same_logits_before_and_after_an_export(tmp_path, name):
    kind, rope = ROPES[name]
    case = write_case(tmp_path, kind, {"rope_parameters": rope})
    CHECKS["logits"](case)
    CHECKS["reload"](case)
    with torch.no_grad():
        near(hf_logits(tmp_path / "again"), case.hf(TOKENS).logits)


def edited(folder, **changes):
    file = folder / "config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def test_configs_of_older_transformers_say_the_same(tmp_path):
    rope = {"full_attention": {"rope_type": "linear", "rope_theta": 3e5, "factor": 8.0}}
    rope["sliding_attention"] = {"rope_type": "default", "rope_theta": 500.0}
    gemma = write_case(tmp_path, "gemma3_text", {"sliding_window_pattern": 3, "rope_parameters": rope}).folder
    expected = read_shape(gemma)
    assert expected.slides == (True, True, False, True) and expected.local_rope_base == 500
    edited(
        gemma, rope_parameters="gone", layer_types="gone", _sliding_window_pattern="gone", sliding_window_pattern=3,
        rope_theta=3e5, rope_local_base_freq=500.0, rope_scaling={"rope_type": "linear", "factor": 8.0},
    )  # fmt: skip
    assert read_shape(gemma) == expected
    edited(gemma, rope_theta="gone", rope_local_base_freq="gone")
    assert (read_shape(gemma).rope_base, read_shape(gemma).local_rope_base) == (1e6, 1e4)  # what the class assumes


@pytest.mark.parametrize(
    ("kind", "change", "part"),
    [
        ("llama", {"model_type": "gemma2"}, "model_type must be one of llama, mistral, .*, got 'gemma2'"),
        ("llama", {"model_type": "qwen3_moe"}, "got 'qwen3_moe'; use a checkpoint of a family in docs/models.md"),
        ("llama", {"model_type": ["llama"]}, r"got \['llama'\]"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "one of default, linear, .*, got 'longrope'"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types is .*, which WMTP does not know"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a whole number >= 1, got 0"),
        ("qwen2", {"use_mrope": True}, "use_mrope must be False, got True"),
        ("qwen3", {"attention_bias": True}, "attention_bias must be False, got True"),
        (
            "qwen3",
            {"layer_types": ["chunked_attention"] * 4},
            "layer_types must be 4 of full_attention, sliding_attention",
        ),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping must be None, got 30.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be False"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation must be 'gelu_pytorch_tanh', got 'gelu'"),
        ("gemma3_text", {"rope_local_base_freq": 1.0}, "rope_local_base_freq says 1.0, rope_parameters.sliding_att"),
        ("granite", {"logits_scaling": 0}, "logits_scaling must be a number > 0, got 0"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv is 8.0, which WMTP does not know"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor must be 1, got 0.75"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type of phi3 must be default"),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_key(tmp_path, kind, change, part):
    folder = write_case(tmp_path, kind, {}).folder
    edited(folder, **change)
    with pytest.raises(CheckpointError, match=part) as error:
        from_checkpoint(folder)
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


def test_what_does_not_fit_is_refused(tmp_path):
    dynamic = write_case(tmp_path / "a", "llama", {"rope_parameters": {**YARN, "rope_type": "dynamic"}}).folder
    edited(dynamic, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    load_checkpoint(from_checkpoint(dynamic, max_seq_len=32), dynamic)
    with pytest.raises(CheckpointError, match="type dynamic, which beyond its 64 positions"):
        load_checkpoint(from_checkpoint(dynamic, max_seq_len=65), dynamic)
    phi = from_checkpoint(write_case(tmp_path / "b", "phi3", {}).folder)
    with pytest.raises(UserError, match="targets must have all of k_proj, q_proj, v_proj or none, as phi3 stores them"):
        add_lora(phi, targets=["q_proj", "v_proj"])
    with pytest.raises(CheckpointError, match=r"has attention_multiplier None, the model 0\.5"):
        load_checkpoint(MTPDecoder(replace(phi.config, attention_multiplier=0.5)), tmp_path / "b" / "hf")


def test_an_untrained_model_of_a_family_leaves_as_one(tmp_path):
    folder = write_case(tmp_path, "gemma3_text", {"head_dim": 12}).folder
    model = from_checkpoint(folder, num_future_tokens=2)
    assert not model.norm.scale.any()  # stands for one
    export_hf(model, tmp_path / "export")
    again = from_checkpoint(tmp_path / "export")
    assert again.config == model.config and again.source.config["query_pre_attn_scalar"] == 256


# ----------------------------------------------------------------------------------------------------------------------
# The window


@pytest.mark.parametrize("window", [1, 3, 12, 50])
def test_a_window_is_part_of_both_masks(window):
    ids = torch.tensor([[0] * 4 + [1] * 5 + [-1] * 3, [7] * 12])
    batch, query, key = torch.meshgrid(torch.arange(2), torch.arange(12), torch.arange(12), indexing="ij")
    mask = dense_mask(ids, window)
    assert torch.equal(mask, dense_mask(ids) & (query - key < window))
    assert torch.equal(block_mask(ids, window).mask_mod(batch, 0, query, key), mask)
    assert mask.any(-1).all()


def test_no_mask_is_made_where_no_window_ends(monkeypatch):
    model, made = case_of("Mistral, with its window").model(), []
    monkeypatch.setattr("wmtp.models.decoder.dense_mask", lambda ids, *window: made.append(window))
    model(TOKENS[:, :WINDOW])
    assert not made
    gemma = case_of("Gemma 3, text").model()
    monkeypatch.setattr("wmtp.models.decoder.dense_mask", lambda *given: made.append(given[1:]) or dense_mask(*given))
    gemma(TOKENS)
    assert made == [(WINDOW,)]  # blocks that see everything take the causal path
    given = torch.ones(2, 24, 24, dtype=torch.bool).tril()
    near(gemma(TOKENS, mask=given), gemma(TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("Mistral, with its window", dtype) for dtype in (torch.float32, torch.bfloat16)),
        *(("Gemma 3, text", how) for how in (torch.float32, torch.bfloat16, "compiled")),
    ],
    ids=str,
)
@torch.inference_mode()
def test_rows_leave_the_prompts_that_they_share(name, how, monkeypatch):
    """A window of 8 after prompts of 3, 20 and 11 tokens: soon nothing of a prompt is in it."""
    dtype = torch.float32 if how == "compiled" else how
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = from_checkpoint(case_of(name).folder, num_future_tokens=3, looped_heads=True)  # a window in each round
    load_checkpoint(model, case_of(name).folder)
    model = model.eval().to(dtype)
    prompts, of_rows, tail = [3, 20, 11], [0, 1, 1, 2, 0], 24
    heads = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(4))
    tails = torch.randint(0, 97, (5, tail), generator=torch.Generator().manual_seed(5))
    texts = [torch.cat([heads[p, : prompts[p]], tails[row]]) for row, p in enumerate(of_rows)]
    full = [model(text[None])[:, 0].float() for text in texts]  # [H, S, V]
    decoder = CachedDecoder(model, 3, compile=how == "compiled")
    shared, own = decoder.new_cache(), decoder.new_cache()
    shared.reserve(3, 20)
    for p, length in enumerate(prompts):
        decoder.prefill(heads[p, :length].tolist(), shared.row(p))
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    for start, stop in ((0, 1), (1, 5), (5, 6), (6, 16), (16, tail)):
        states, places = decoder.extend(tails[:, start:stop], [start] * 5, own, Prompts(shared, prompts, of_rows))
        logits = decoder.heads(states, places, own)
        for row, p in enumerate(of_rows):
            expected = full[row][:, prompts[p] + start : prompts[p] + stop]
            torch.testing.assert_close(logits[:, row], expected, atol=tolerance, rtol=tolerance)


def test_the_table_names_no_key_twice():
    from wmtp.pretrained.config_files import known_keys

    shared = {key for part in known_keys()["config.json"].values() for key in part}
    for name, family in TABLE.items():
        own = [*family.keys, *family.fixed]
        assert len(own) == len(set(own)), name
        assert not (set(own) & shared) - {"original_max_position_embeddings"}, name
    assert not re.search(r"[^\x00-\x7f]", " ".join(TABLE))
