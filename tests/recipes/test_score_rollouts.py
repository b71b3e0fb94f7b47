"""Values from rollouts end to end: a tiny random model, the real judge, real processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from processes import run_recipe_file, start

from recipes.critic_stage1 import CriticStage1Recipe
from recipes.score_rollouts import ScoreRolloutsRecipe
from wmtp.config import ConfigError, build
from wmtp.critic.pairs import jsonl_pairs
from wmtp.critic.rollouts import prefix_id
from wmtp.data import read_rows, scored
from wmtp.errors import UserError
from wmtp.generation import Request, Sampling, generate
from wmtp.pretrained import byte_tokenizer

# After its second line a program is whole, and one more byte breaks it or does not; the third line breaks it.
RIGHT, FAULTY = "def f():\n    return 1\n#\n", "def f():\n    return 1\n1 +\n"
FILES = ("lines.jsonl", "programs.jsonl", "manifest.json", "data/part-00000.parquet")


@pytest.fixture
def one_task(tiny_config, tmp_path):
    """One task with a right and a faulty program, and completions of one byte."""
    task = {"task_id": 1, "text": "One.", "code": RIGHT, "test_list": ["assert f() == 1"]}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    pair = {"task_id": 1, "correct": RIGHT, "incorrect": FAULTY, "fault_line": 3}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")

    def config(name="alone", **overrides):
        cfg = tiny_config("score_rollouts", output_dir=str(tmp_path / name), max_new_tokens=1, num_samples=24)
        cfg.judges = 1
        cfg.tasks = {"_component_": "wmtp.eval.assertion_tasks", "source": str(tmp_path / "tasks.jsonl")}
        cfg.programs = {
            "_component_": "wmtp.eval.paired_programs", "source": str(tmp_path / "pairs.jsonl")
        }  # fmt: skip
        for key, value in overrides.items():
            OmegaConf.update(cfg, key.replace("__", "."), value, merge=False)
        return cfg

    return config


def run_here(cfg):
    recipe = ScoreRolloutsRecipe(cfg)
    recipe.setup()
    recipe.roll_out()
    recipe.report()
    recipe._sandbox.close()
    return recipe


def written(output_dir):
    return {name: (Path(output_dir) / name).read_bytes() for name in FILES}


def lines_of(output_dir, name="lines.jsonl"):
    return [json.loads(line) for line in (Path(output_dir) / name).read_text().splitlines()]


def test_values_are_the_pass_rates_that_python_finds_and_training_reads_them(one_task):
    cfg = one_task()
    recipe = run_here(cfg)
    right, faulty = lines_of(cfg.output_dir)
    assert right["passes"] and not faulty["passes"] and right["values"][-1] == 1.0 and faulty["values"][-1] == 0.0
    # The two programs begin alike, so they share their prefixes and their values up to there.
    assert right["values"][:2] == faulty["values"][:2] and right["prompt_value"] == right["values"][0] == 0.0

    # The same completions, asked for one by one, and run by this Python: one byte after a whole function.
    torch.manual_seed(cfg.seed)
    model, tokenizer = build(cfg.model, where="model").eval(), byte_tokenizer()
    (prompt,) = recipe._prompts.values()
    prefix = (*tokenizer.encode_prompt(prompt), *tokenizer.encode("def f():\n    return 1\n"))
    name, passed = prefix_id("Mbpp/1", prefix), 0
    for n in range(24):
        (done,) = generate(
            model, tokenizer, [Request(n, prefix, (cfg.seed, name, n))], Sampling(1, 0.8, 0.95), batch_size=1
        )
        try:
            exec("def f():\n    return 1\n" + done.text, {})
            passed += 1
        except Exception:  # whatever the byte is
            pass
    assert 0 < passed < 24 and right["values"][1] == passed / 24

    documents = scored(tokenizer, source=cfg.output_dir)
    assert documents.signals == ("values",) and len(documents) == 2
    for document, line in zip(documents, (right, faulty), strict=True):
        start = len(document.prompt)
        ends = start + np.array([len(b"def f():\n"), len(RIGHT) - 2, len(document) - start - 1]) - 1
        np.testing.assert_allclose(document.signals["values"][ends], line["values"], atol=1e-6)
    # All programs that were judged, each once, as pairs of the critic's first stage.
    file = str(Path(cfg.output_dir) / "programs.jsonl")
    rows = [row for _, row in read_rows(file)]
    assert len({row["completion"] for row in rows}) == len(rows) > 20
    pairs = jsonl_pairs(file, max_pairs_per_problem=4)
    assert len(pairs) == 4 and pairs[0].prompt == prompt and pairs[0].problem == "Mbpp/1"


def test_the_critics_first_stage_learns_from_every_program_that_was_judged(one_task, tiny_config, tmp_path):
    tasks = [
        {
            "task_id": n,
            "text": f"Return {n}.",
            "code": f"def f():\n    return {n}\n",
            "test_list": [f"assert f() == {n}"],
        }
        for n in range(4)
    ]
    pairs = [
        {"task_id": n, "correct": task["code"], "incorrect": f"def f():\n    return {n} +\n"}
        for n, task in enumerate(tasks)
    ]
    for name, rows in (("tasks", tasks), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_here(one_task(num_samples=2))
    (judged := lines_of(tmp_path / "alone", "programs.jsonl")).sort(key=lambda row: row["completion"])
    assert sum(row["is_correct"] for row in judged) >= 4 and len(judged) > 8  # the given ones, and sampled ones

    source = {"_component_": "wmtp.critic.jsonl_pairs", "source": str(tmp_path / "alone" / "programs.jsonl")}
    cfg = tiny_config(
        "critic_stage1", dataset=source, loss="mse", reward_spread="uniform", heldout_fraction=0.25, seq_len=128,
        balance_lengths=False, batch_size=2, max_steps=3, eval_every=None, save_every=None,
    )  # fmt: skip
    critic = CriticStage1Recipe(cfg)
    critic.setup()
    critic.train()
    critic.finish()
    assert {pair.problem for pair in (*critic._data.pairs, *critic._heldout.pairs)} == {f"Mbpp/{n}" for n in range(4)}
    assert (tmp_path / "critic_stage1" / "value_model").is_dir()


def test_processes_batches_and_interruptions_change_nothing(one_task, tmp_path):
    run_here(one_task())
    expected = written(tmp_path / "alone")

    two = one_task("two", batch_size=5)
    OmegaConf.save(two, tmp_path / "two.yaml")
    start(run_recipe_file, "score_rollouts", str(tmp_path / "two.yaml"), size=2, log=tmp_path / "log.txt").join()
    assert written(two.output_dir) == expected

    # As a kill leaves it: the journal ends within a record, and no result is there. First with fewer samples.
    cut = one_task("cut", num_samples=9)
    run_here(cut)
    (journal,) = (tmp_path / "cut" / "journals").iterdir()
    whole = journal.read_bytes()
    journal.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut" / "manifest.json").unlink()
    cut.resume, cut.num_samples = True, 24
    run_here(cut)
    assert written(cut.output_dir) == expected
    cut.temperature = 0.5
    with pytest.raises(ValueError, match="temperature"):
        run_here(cut)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_sample": 3}, "unknown key 'num_sample' in config; did you mean 'num_samples'"),
        ({"temperature": 0.0}, "temperature must be a number > 0, got 0.0"),
        ({"within_line": "start"}, "within_line must be one of"),
        ({"programs__source": "absent.jsonl"}, "absent.jsonl does not exist"),
        ({"protocol": {"_component_": "wmtp.eval.chat_protocol"}}, "protocol chat asks in messages, but here"),
        ({"model__max_seq_len": 40}, "all 2 programs are longer than model.max_seq_len 40; raise it"),
        ({"model__vocab_size": 100}, "the tokenizer has 259 ids, the model 100"),
        ({"kv_memory": "1KB"}, "the longest prefix has "),
        ({"num_samples": 0}, "num_samples must be a whole number >= 1, got 0"),
        ({"num_drafts": 5}, "num_drafts must be a whole number between 0 and the model's extra heads"),
        ({"resume": True}, "holds no run to go on with"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_sampled(one_task, overrides, message):
    with pytest.raises((ConfigError, UserError)) as error:
        ScoreRolloutsRecipe(one_task(**overrides)).setup()
    assert message in str(error.value) and "\n" not in str(error.value)
