"""What a run shows of its data before training: the tokens with the weights that the loss gives them, and no more."""

import json
from pathlib import Path

import pytest
import torch

from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP
from recipes.lora_wmtp import LoRARecipeWMTP
from wmtp.config import load
from wmtp.critic import Pair, Pairs, encode_pairs, preview_pairs
from wmtp.pretrained import byte_tokenizer
from wmtp.report.tokens import token_pieces, token_table

TOKENIZER = byte_tokenizer()
ROOT = Path(__file__).resolve().parents[2]
SPEED = ("time", "per_second", "/data_wait", "/peak_memory_gib", "/tflops")  # ends of figures that differ each time


def test_a_table_ends_its_lines_where_the_code_does_and_where_it_must():
    tokens = [*b"if x:\n\t", 0xEA, 0xB0, 0x80, *b"\x1b", TOKENIZER.eos_id]
    pieces = token_pieces(TOKENIZER, tokens)
    figures = ["", "", "", "0.50", "", "", "1.00", "", "", "12.00", "", "2.25"]
    assert token_table(pieces, {"weight": figures}).splitlines() == [
        "token  i f · x    : \\n",
        "weight       0.50",
        "token  \\t   ~ ~ 가    \\x1b <eos>",
        "weight 1.00     12.00      2.25",
    ]
    letters = "abcdefghijklmnopqrstuvwxyz"
    long = token_table(list(letters), {"weight": ["1.00"] * len(letters)}).splitlines()
    assert long == [
        line
        for part in ("    ".join(letters[:18]), "    ".join(letters[18:]))
        for line in (f"token  {part}", "weight " + " ".join(["1.00"] * len(part.split())))
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "job"), [(FullFinetuneRecipeWMTP, "rho1"), (LoRARecipeWMTP, "lora_rho1")])
def test_a_run_shows_its_data_and_trains_as_it_would_without(recipe, job, tmp_path, capsys):
    """The five targets of a document, two fifths kept: the two with the least reference CE weigh 5 / 2."""
    rows = [
        {"prompt": "ab", "completion": "cdef", "id": f"d{i}", "reference_ce": [0, 0, 1, 5, 2, 4, 3]} for i in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"topic": "x"}) + "\n" for row in rows))
    figures = []
    for shown in (0, 3):
        cfg = load(ROOT / "configs" / "tiny" / f"{job}.yaml")
        cfg.dataset = {"_component_": "wmtp.data.prompt_completion", "source": str(tmp_path / "rows.jsonl")}
        cfg.weighting = {"_component_": "wmtp.weighting.rho1", "score": "reference", "percentile": 0.4}
        cfg |= {"tracking": None, "eval_dataset": None, "reference_model": None, "checkpoint": None, "token_view": None}
        cfg |= {"reference_checkpoint": None, "max_steps": 2, "packed": False, "batch_size": 2, "seq_len": 8}
        cfg |= {"output_dir": str(tmp_path / str(shown)), "preview": shown}
        if job == "lora_rho1":
            cfg.adapters.dropout = 0.5  # draws random numbers while it trains
        job_run = recipe(cfg)
        job_run.setup()
        job_run.train()
        lines = map(json.loads, (tmp_path / str(shown) / "metrics.jsonl").read_text().splitlines())
        figures.append([{k: v for k, v in line.items() if not k.endswith(SPEED)} for line in lines])
        said = capsys.readouterr().err
        assert (
            f"dataset: {tmp_path}/rows.jsonl: 4 rows of 8 tokens, 4 documents, 20 targets, 0 cut, 0 dropped (no target "
            "within seq_len), 87.5% full (columns not read: topic)"
        ) in said
    assert figures[0] == figures[1] and len(figures[0]) == 2
    table = "token  a b c    d    e    f    <eos>\nweight     2.50 0.00 2.50 0.00 0.00\n"
    for i in range(3):
        assert f"preview of d{i}: 7 tokens, 5 targets, each with its weight below it\n{table}" in said
    assert "preview of d3" not in said


def test_a_pairs_preview_shows_what_is_taught_at_each_token():
    pairs = Pairs("pairs", (Pair("p", "a", "bc", "d", None, 0.9, -0.5), Pair("q", "", "x", "y")))
    data = encode_pairs(TOKENIZER, pairs, seq_len=8)
    text = preview_pairs(1, data, TOKENIZER, "length", gamma=None, gae_lambda=None)
    assert text.splitlines() == [
        "preview of p (correct): 4 tokens, 3 targets, each with its reward below it",
        "token  a b    c    <eos>",
        "reward   0.30 0.60 0.90",
        "preview of p (incorrect): 3 tokens, 2 targets, each with its reward below it",
        "token  a d     <eos>",
        "reward   -0.25 -0.50",
    ]
    # gae from values of 0: G_T = r, and before it gamma * lambda * G_{j+1}.
    assert "reward   0.58 0.72 0.90" in preview_pairs(1, data, TOKENIZER, "gae", gamma=1.0, gae_lambda=0.8)
    assert preview_pairs(9, data, TOKENIZER).count("preview of ") == 4
    assert torch.is_grad_enabled()
