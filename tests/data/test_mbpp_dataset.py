"""MBPP as fine-tuning documents: exact prompts, clean programs, the published splits."""

import ast
import hashlib
import json
from pathlib import Path

import pytest
from shared_data import DATA, needs

from wmtp.data import few_shot_tasks, mbpp
from wmtp.pretrained import byte_tokenizer

MBPP = DATA / "mbpp"
TOKENIZER = byte_tokenizer()


def row(task_id: int = 601, **changes) -> dict:
    return {
        "task_id": task_id,
        "text": f"Write task {task_id}.",
        "code": "def f(x):\r\n\treturn x \r\n",
        "test_list": ["assert f(1) == 1", "assert f('\\n') == '\\n'"],
        "test_setup_code": "",
        "challenge_test_list": [],
        **changes,
    }


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return str(path)


def texts(documents) -> list[tuple[str, str]]:
    """(prompt, target) of each document, the target with its EOS."""
    return [(TOKENIZER.decode(d.tokens[d.labels < 0]), TOKENIZER.decode(d.tokens[d.labels >= 0])) for d in documents]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("docstring", '"""\nWrite task 601.\nassert f(1) == 1\nassert f(\'\\n\') == \'\\n\'\n"""\n'),
        ("bigcode", '"""\nWrite task 601.\nassert f(1) == 1\n"""\n'),
    ],
)
def test_prompt_formats_to_the_character(prompt, expected, tmp_path):
    documents = mbpp(TOKENIZER, source=write(tmp_path / "t.jsonl", [row()]), prompt=prompt)
    assert texts(documents) == [(expected, "def f(x):\n\treturn x \n<eos>")]
    assert documents[0].id == "mbpp/601"


def test_three_shot_is_the_papers_prompt(tmp_path):
    write(tmp_path / "prompt.json", [row(i, code=f"code {i}", test_list=["assert a", "assert b"]) for i in range(1, 6)])
    write(tmp_path / "train.json", [row(code="gold")])
    task = (
        "You are an expert Python programmer, and here is your task: Write task {}. Your code should pass these tests:"
    )
    shots = [f"{task.format(i)}\n\nassert a\nassert b\n[BEGIN]\ncode {i}\n[DONE]\n\n" for i in (2, 3, 4)]
    last = f"{task.format(601)}\n\nassert f(1) == 1\nassert f('\\n') == '\\n'\n[BEGIN]\n"
    documents = mbpp(TOKENIZER, source=str(tmp_path), prompt="3shot")
    assert texts(documents) == [("".join(shots) + last, "gold\n[DONE]<eos>")]
    write(tmp_path / "prompt.json", [row(2)])
    with pytest.raises(ValueError, match=r"shows MBPP tasks 2, 3, 4, but the split 'prompt' of .* lacks \[3, 4\]"):
        few_shot_tasks(str(tmp_path))


def test_one_file_of_all_tasks_is_split_by_the_published_ids(tmp_path):
    source = write(tmp_path / "mbpp.jsonl", [row(i) for i in range(1, 975)])
    counts = {s: len(mbpp(TOKENIZER, source=source, split=s)) for s in ("prompt", "test", "validation", "train", "all")}
    assert counts == {"prompt": 10, "test": 500, "validation": 90, "train": 374, "all": 974}


def test_the_sanitized_schema(tmp_path):
    sanitized = row(text=None, prompt="Write it.", test_imports=["import math"])
    del sanitized["text"]
    documents = mbpp(TOKENIZER, source=write(tmp_path / "s.json", [sanitized]), prompt="bigcode")
    assert texts(documents)[0][0] == '"""\nWrite it.\nassert f(1) == 1\n"""\n'


@needs("mbpp")
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize(("split", "count"), [("train", 374), ("validation", 90), ("test", 500)])
def test_every_real_task_is_valid_python_with_lf_line_ends(split, count):
    documents = mbpp(TOKENIZER, source=str(MBPP), split=split)
    assert len(documents) == count
    for prompt, target in texts(documents):
        assert "\r" not in prompt + target
        ast.parse(prompt + target.removesuffix("<eos>"))


@needs("mbpp")
def test_the_real_training_set_keeps_its_golden_text():
    documents = mbpp(TOKENIZER, source=str(MBPP))
    digest = hashlib.sha256("".join(p + t for p, t in texts(documents)).encode()).hexdigest()
    assert digest == "b735d83909f24edcb60e37eb7299a082b1cf2c306b8cb29d3b75555c9ad30e4d"
    assert [d.id for d in documents] == [f"mbpp/{i}" for i in range(601, 975)]


def test_a_row_without_its_fields_is_named(tmp_path):
    broken = row(602)
    del broken["code"]
    lines = write(tmp_path / "t.jsonl", [row(), broken])
    with pytest.raises(
        ValueError, match=r"t.jsonl:2: field 'code' is missing; the row has task_id, text, test_list, test_s"
    ):
        mbpp(TOKENIZER, source=lines)
    array = write(tmp_path / "t.json", [row(), broken])
    with pytest.raises(ValueError, match=r"t.json: row 2: field 'code' is missing"):
        mbpp(TOKENIZER, source=array)
    with pytest.raises(ValueError, match=r"row 1: field 'test_list' must be a list of strings, got \[1\]"):
        mbpp(TOKENIZER, source=write(tmp_path / "u.json", [row(test_list=[1])]))
    with pytest.raises(ValueError, match=r"row 1: field 'task_id' must be a whole number, got str 'x'"):
        mbpp(TOKENIZER, source=write(tmp_path / "u.json", [row(task_id="x")]))


def test_wrong_arguments_are_one_clear_line(tmp_path):
    source = write(tmp_path / "t.jsonl", [row(11)])
    with pytest.raises(ValueError, match="prompt must be one of docstring, bigcode, 3shot, got 'chat'"):
        mbpp(TOKENIZER, source=source, prompt="chat")
    with pytest.raises(ValueError, match="split must be one of prompt, test, validation, train, all, got 'dev'"):
        mbpp(TOKENIZER, source=source, split="dev")
    with pytest.raises(ValueError, match=r"the dataset is empty \(left out: 1 tasks of other splits\)"):
        mbpp(TOKENIZER, source=source, split="train")
