"""lm-evaluation-harness asks a checkpoint through `wmtp` what its own `hf` model asks the exported folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from older_transformers import ROOT, folder_of_pins
from random_models import random_decoder

from wmtp.models import export_hf
from wmtp.pretrained import byte_tokenizer, checkpoint_sha256

# What the harness imports for these tasks and this environment lacks.
PINS = [
    *("lm_eval==0.4.13", "sacrebleu==2.6.0", "portalocker==4.4.2", "tabulate==0.10.0", "colorama==0.4.6"),
    *("pytablewriter==1.2.1", "dataproperty==1.1.1", "mbstrdecoder==1.1.5", "pathvalidate==3.3.1", "tabledata==1.3.5"),
    *("tcolorpy==0.1.7", "typepy==2.0.0", "chardet==7.7.0"),
]


def run(command: list, folder: Path | None) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), *([] if folder is None else [str(folder)])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The harness, an exported model, the local tasks, and what the harness' model and ours answered."""
    harness, folder = folder_of_pins("lm_eval-0.4.13", PINS), tmp_path_factory.mktemp("lm_eval")
    sizes = {"vocab_size": 260, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32}
    model = random_decoder(**sizes, intermediate_dim=64, max_seq_len=64, num_future_tokens=3)
    model.unembedding.data[[*range(32), *range(127, 260)]] = 0.0  # so that printable characters are the likeliest
    export_hf(model, folder / "export", tokenizer_source=byte_tokenizer())
    done = run([ROOT / "tests" / "eval" / "lm_eval_tasks.py", folder / "export", folder], harness)
    assert done.returncode == 0, done.stderr[-2000:]
    return harness, folder, json.loads((folder / "answers.json").read_text())


@pytest.mark.long
def test_likelihoods_and_texts_are_those_of_the_harness_own_model(asked):
    """Contexts that are empty, end in a space or are too long; rolling windows; greedy flags; all heads decoding."""
    _, folder, answers = asked
    hf, wmtp, heads = (answers[name] for name in ("hf", "wmtp", "heads"))
    flat = lambda of: [score for sample in of["multiple_choice"] for [score] in sample]
    assert sum(greedy for _, greedy in flat(hf)) >= 10
    for ours in (wmtp, heads):
        for (theirs, flag), (score, our_flag) in zip(flat(hf), flat(ours), strict=True):
            assert abs(score - theirs) < 1e-4 and our_flag == flag
        for [[theirs]], [[score]] in zip(hf["loglikelihood_rolling"], ours["loglikelihood_rolling"], strict=True):
            assert abs(score - theirs) < 1e-4
        assert ours["generate_until"] == hf["generate_until"]
    assert wmtp["config"]["wmtp.model_sha256"] == checkpoint_sha256(folder / "export")


@pytest.mark.long
def test_the_harness_own_command_line_takes_it_and_mistakes_are_one_line(asked):
    harness, folder, _ = asked
    command = ["-m", "wmtp.eval.lm_eval_model", "run", "--model", "wmtp", "--tasks", "local_multiple_choice"]
    command += ["--include_path", folder, "--model_args"]
    done = run([*command, f"pretrained={folder / 'export'}"], harness)
    assert done.returncode == 0 and "local_multiple_choice" in done.stdout, done.stderr[-2000:]
    done = run([*command, f"pretrained={folder / 'export'},num_drafts=3"], harness)
    assert done.returncode == 1 and "num_drafts must be 0 to 2, one less than" in done.stderr.splitlines()[-1]


SPACES = """
import sys
from lm_eval.api.instance import Instance
from wmtp.eval.lm_eval_model import WMTPModel
asked = [Instance("loglikelihood", {}, pair, 0) for pair in [("", " ab"), (" ", "ab"), ("of", " another row")]]
print(*(score for score, _ in WMTPModel(sys.argv[1], device="cpu", batch_size=3).loglikelihood(asked)))
"""


@pytest.mark.long
def test_a_context_of_spaces_alone_is_an_empty_one(asked):
    """The harness' own model fails there, for a tokenizer that adds no BOS."""
    harness, folder, _ = asked
    done = run(["-c", SPACES, folder / "export"], harness)
    empty, spaces, _ = map(float, done.stdout.split())
    assert spaces == pytest.approx(empty, abs=1e-4)


@pytest.mark.slow
def test_without_the_harness_one_line_says_what_to_install():
    hidden = "import runpy, sys; sys.modules['lm_eval'] = None; "
    done = run(["-c", f"{hidden}runpy.run_module('wmtp.eval.lm_eval_model', run_name='__main__')"], None)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("pip install lm_eval==0.4.13")
    assert "Traceback" not in done.stderr
