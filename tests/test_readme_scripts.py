"""README's two scripts, as they stand there but for the folder: `transformers` alone, and ten lines of this library."""

import re
import sys
from pathlib import Path

import pytest
from processes import start
from random_models import random_decoder

from wmtp.models import export_hf
from wmtp.pretrained import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "runs/quickstart/rho1/export"
SCRIPTS = [
    block
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if FOLDER in block
]


@pytest.fixture
def export(tmp_path):
    sizes = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16, "intermediate_dim": 24}
    model = random_decoder(vocab_size=259, max_seq_len=128, num_future_tokens=4, **sizes)
    export_hf(model, tmp_path / "export", tokenizer_source=byte_tokenizer())
    return tmp_path / "export"


def run_without_wmtp(script):
    """In a process of its own, where nothing of this project can be imported."""
    ours = [name for name in sys.modules if name.partition(".")[0] in ("wmtp", "recipes")]
    sys.modules.update(dict.fromkeys([*ours, "wmtp"]))
    exec(script, {})


def test_both_scripts_say_the_same(export, tmp_path, capsys):
    alone, here = (script.replace(FOLDER, str(export)) for script in SCRIPTS)
    assert "wmtp" not in alone.replace(str(export), "") and len(here.splitlines()) <= 15
    log = tmp_path / "log"
    log.touch()
    start(run_without_wmtp, alone, log=log).join(timeout=120)
    exec(here, {"__name__": "readme"})
    said = capsys.readouterr().out
    text = log.read_text().split("def add(a, b):", 1)[1]
    assert text.strip() == said.split(" {")[0].rsplit(" ", 1)[0].strip()
    assert "{2: " in said and said.count("tensor(") == 1
