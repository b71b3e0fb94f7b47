"""Weights of the data inside the full recipe: a run on chats that resumes, and what must not be misread."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP
from recipes.score_reference import ScoreReferenceRecipe
from runs import ROOT, read_metrics, series
from wmtp.config import load
from wmtp.data.scored_dataset import read_manifest
from wmtp.training.checkpoint import complete_checkpoints

EXAMPLE = ROOT / "configs" / "smollm2_135m" / "chat"
CHATML = ROOT / "tests" / "data" / "chat_templates" / "chatml.jinja"
GIVEN = {"_component_": "wmtp.weighting.given"}
BYTES = {"_component_": "wmtp.pretrained.byte_tokenizer", "chat_template": str(CHATML)}
CHAT = {"_component_": "wmtp.data.chat", "source": str(EXAMPLE), "split": "train"}
BRIEF = {"save_every": None, "eval_every": None, "eval_dataset": None, "export_dtype": "none", "token_view": None}


@pytest.fixture
def train(tiny_config, run_recipe):
    def run(name, job="uniform", **overrides):
        cfg = tiny_config(job, output_dir=name, **BRIEF)
        for key, value in ({"tokenizer": BYTES, "dataset": CHAT, "weighting": GIVEN} | overrides).items():
            OmegaConf.update(cfg, key.replace("__", "."), value, merge=False)
        return series([line for line in run_recipe(cfg) if "train/loss" in line])

    return run


def test_a_weighted_run_on_chats_resumes_bit_for_bit(train, capsys):
    pages = {"_component_": "wmtp.report.TokenWeightPages", "every": 3}
    options = {"max_steps": 6, "save_every": 2, "preview": 1, "token_view": pages}
    whole = train("whole", **options)
    shown = capsys.readouterr()
    assert "columns not read" not in shown.err + shown.out
    assert any(line["weights/max"] == 2.0 and line["weights/mean"] > 1 for line in whole)
    page = (Path("whole") / "token_weights" / "step_00000003.html").read_text()
    assert "this run" in page and "given weight" in page
    train("cut", **options)
    shutil.rmtree(complete_checkpoints(Path("cut/checkpoints"))[-1])  # as if killed after step 4
    assert train("cut", **options, resume=True) == whole


def test_the_run_s_loss_is_the_one_computed_by_hand(tiny_config, tmp_path):
    """Two heads, packed rows, a document that is cut: documents one by one, with weights written for each byte.

    A mixture of chats whose prompts count, prompts with a span, and texts; `é` has two bytes.
    """
    chats = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sé!", "weight": 2,
              "weights": [{"start": 1, "end": 2, "weight": 3}]}], "weight": 0.5}]  # fmt: skip
    pairs = [
        {"prompt": "aé", "completion": "béc", "weights": [{"start": 1, "end": 3, "weight": 4}]},
        {"prompt": "q", "completion": "r"},
    ]
    texts = [{"text": "x" * 100, "weights": [0.5] * 70 + [9] * 31}]
    parts = {}
    for name, rows in (("chat", chats), ("prompt_completion", pairs), ("text", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        parts[name] = {"_component_": f"wmtp.data.{name}", "source": str(tmp_path / f"{name}.jsonl")}
    parts["chat"]["prompt_weight"] = 0.25
    asked, said = (
        b"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Sé!<|im_end|>\n".encode(),
    )  # the template marks no line end
    eos, seq_len = 257, 72
    by_hand = [  # ids, and the weight of each target
        ([*asked, *said], [None] + [0.125] * (len(asked) - 1) + [1, 3, 3] + [1] * (len(said) - 4) + [0.125]),
        ([*"aébéc".encode(), eos], [None, None, None, 1, 4, 4, 4, 1]),
        ([*b"qr", eos], [None, 1, 1]),
        ([*b"x" * 100, eos], [None] + [0.5] * 69 + [9] * 31),
    ]
    data = {"_component_": "wmtp.data.mixture", "parts": parts}
    cfg = tiny_config(output_dir="hand", **BRIEF, seq_len=seq_len, batch_size=3, max_steps=1)
    for key, value in {"tokenizer": BYTES, "dataset": data, "weighting": GIVEN}.items():
        OmegaConf.update(cfg, key, value, merge=False)
    recipe = FullFinetuneRecipeWMTP(cfg)
    recipe.setup()
    loss = num = 0.0
    for ids, weights in by_hand:
        ids, weights = ids[:seq_len], weights[:seq_len]
        with torch.no_grad():
            logits = recipe._model(torch.tensor([ids]))[:, 0].double()  # [H, T, V]
        for k in (1, 2):
            for t, weight in enumerate(weights[k:]):
                if weight is not None:
                    loss += weight * float(torch.logsumexp(logits[k - 1, t], 0) - logits[k - 1, t, ids[t + k]])
                    num += 1
    recipe.train()
    [line] = [line for line in read_metrics("hand") if "train/loss" in line]
    assert line["train/loss"] == pytest.approx(loss / num, rel=1e-5)


def test_weights_of_1_train_as_no_weights_and_others_do_not(train, tmp_path):
    rows = [json.loads(line) for line in (EXAMPLE / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("weight", None)
        row["messages"] = [{k: v for k, v in m.items() if k not in ("weight", "weights")} for m in row["messages"]]
    for name, more in (("plain", {}), ("ones", {"weight": 1.0})):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    sources = {name: CHAT | {"source": str(tmp_path / f"{name}.jsonl")} for name in ("plain", "ones")}
    uniform = {"_component_": "wmtp.weighting.uniform"}

    def figures(lines):
        return [{k: v for k, v in line.items() if k.startswith("train/")} for line in lines]

    plain = figures(train("plain", max_steps=3, dataset=sources["plain"], weighting=uniform))
    assert figures(train("ones", max_steps=3, dataset=sources["ones"])) == plain
    assert figures(train("others", max_steps=3)) != plain


def test_weights_that_nobody_reads_are_said_and_prompts_among_them_refused(train, capsys):
    uniform = {"_component_": "wmtp.weighting.uniform"}
    train("said", max_steps=1, weighting=uniform)
    assert "columns not read: weight" in "".join(capsys.readouterr())
    counted = CHAT | {"prompt_weight": 0.1}
    refused = "prompt_weight makes its prompts targets, but {} does not read their weights"
    with pytest.raises(ValueError, match=refused.format("this weighting")) as error:
        train("refused", max_steps=1, weighting=uniform, dataset=counted)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=refused.format("held-out CE")):
        train("held_out", max_steps=1, eval_dataset=counted)
    assert train("read", max_steps=1, dataset=counted)[0]["weights/p25"] < 0.3
    with pytest.raises(
        ValueError, match="this weighting needs weight: give the data's rows, turns or characters a weight"
    ):
        train("none", max_steps=1, dataset=CHAT | {"split": "heldout"})


def test_scored_data_keep_their_weights(train, tiny_config, models):
    cfg = tiny_config("score_reference", checkpoint=str(models / "reference"), seq_len=256)
    cfg.tokenizer = BYTES
    cfg.dataset = {**CHAT, "_component_": "wmtp.data.chat_stream", "prompt_weight": 0.5}
    recipe = ScoreReferenceRecipe(cfg)
    recipe.setup()
    recipe.report(recipe.score())
    folder = Path(str(cfg.output_dir))
    assert read_manifest(folder)["must_read"] == ["weight"]
    data = {"_component_": "wmtp.data.scored", "source": str(folder)}
    with pytest.raises(ValueError, match="prompt_weight makes its prompts targets"):
        train("misread", "rho1_scored", dataset=data, max_steps=1, weighting={"_component_": "wmtp.weighting.rho1"})
    both = GIVEN | {"combine": "multiply", "method": {"_component_": "wmtp.weighting.rho1"}, "normalize": "mean"}
    [line] = train("both", "rho1_scored", dataset=data, max_steps=1, weighting=both)
    assert line["weights/mean"] == pytest.approx(1, abs=1e-4)
    chats = CHAT | {"prompt_weight": 0.5}
    [alone] = train("alone", dataset=data, max_steps=1)
    assert alone == train("same", dataset=chats, max_steps=1)[0]


def test_the_shipped_config_runs_with_a_small_model(tmp_path, monkeypatch, run_recipe):
    """SmolLM2's tokenizer and chat template, the example's conversations; a model of two small blocks."""
    cfg = load(ROOT / "configs" / "smollm2_135m" / "chat.yaml")
    monkeypatch.chdir(ROOT)
    small = {"_component_": "wmtp.models.llama_mtp", "vocab_size": 49152, "num_layers": 2, "num_heads": 2}
    small |= {"num_kv_heads": 1, "embed_dim": 16, "intermediate_dim": 16, "max_seq_len": 512, "num_future_tokens": 4}
    cfg.model = small | {"tie_word_embeddings": True}
    cfg.tokenizer.path = cfg.checkpoint
    changes = {"checkpoint": None, "tracking": None, "device": "cpu", "max_steps": 2, "export_dtype": "none"}
    cfg.update({**changes, "output_dir": str(tmp_path / "chat"), "data_cache": str(tmp_path / "cache")})
    lines = run_recipe(cfg)
    assert "eval/ce_head4" in lines[0] and any(line.get("weights/max", 0) > 1 for line in lines)


def test_a_mixture_trains_by_its_shares(train, tmp_path, capsys):
    """Chats with weights and joined texts without any, whose length the config's seq_len gives."""
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"text {i} " * 20}) + "\n" for i in range(40)))
    text = {"_component_": "wmtp.data.text", "source": str(tmp_path / "t.jsonl"), "piece_len": "${seq_len}"}
    parts = {"chat": CHAT, "text": text | {"joined": True}}
    shares = {"chat": 1, "text": 2}
    data = {"_component_": "wmtp.data.mixture", "parts": parts, "shares": shares}
    figures = train("mixed", max_steps=2, dataset=data)
    shown = "".join(capsys.readouterr())
    assert "mixture of chat (8 of 8 documents, 34.8%" in shown and "text (" in shown
    assert figures == train("again", max_steps=2, dataset=data)  # from the cache
    assert figures == train("in_memory", max_steps=2, dataset=data, data_cache=None)


@pytest.mark.long
def test_a_weighted_mixture_on_two_processes_resumes_bit_for_bit(tiny_config, run_distributed, tmp_path):
    """Given weights times a method's, mean 1; the mixture repeats its smaller part, and the run begins it again."""
    texts = "".join(json.dumps({"text": f"text {i} " * 20}) + "\n" for i in range(20))
    (tmp_path / "t.jsonl").write_text(texts)
    text = {"_component_": "wmtp.data.text", "source": str(tmp_path / "t.jsonl"), "piece_len": 128, "joined": True}
    data = {"_component_": "wmtp.data.mixture", "parts": {"chat": CHAT, "text": text}}
    data |= {"shares": {"chat": 3, "text": 1}, "stopping_strategy": "all_exhausted"}
    weighting = GIVEN | {"combine": "multiply", "method": {"_component_": "wmtp.weighting.dft"}, "normalize": "mean"}

    def config(name, **more):
        cfg = tiny_config(output_dir=name, **BRIEF, seq_len=256, batch_size=1, max_steps=12)
        for key, value in ({"tokenizer": BYTES, "dataset": data, "weighting": weighting} | more).items():
            OmegaConf.update(cfg, key, value, merge=False)
        cfg.output_dir, cfg.save_every = str(tmp_path / name), 4
        return cfg

    losses = lambda lines: series([line for line in lines if "train/loss" in line])
    whole, _ = run_distributed(2, config("whole"), config("cut"))
    shutil.rmtree(complete_checkpoints(tmp_path / "cut" / "checkpoints")[-1])
    [cut] = run_distributed(2, config("cut", resume=True))
    assert losses(cut) == losses(whole) and len(losses(whole)) == 12
    assert any(line["weights/max"] > 1.2 for line in losses(whole))
