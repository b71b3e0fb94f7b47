"""Files as they come: what can be read is read exactly, and what cannot is one line with the place and the way out."""

import errno
import gzip
import json
import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wmtp.critic import code_contests_pairs, condefects_pairs, jsonl_pairs
from wmtp.data import (
    mbpp,
    pack,
    prompt_completion,
    prompt_completion_stream,
    python_functions,
    read_rows,
    tokenized,
    tokenized_stream,
)
from wmtp.data.rows import count_rows, reading
from wmtp.errors import UserError
from wmtp.eval import assertion_tasks, code_contests, mbpp_tasks
from wmtp.eval.samples import read_samples
from wmtp.pretrained import byte_tokenizer
from wmtp.pretrained.config_files import CheckpointError, read_json

TOKENIZER = byte_tokenizer()
HALF = "\ud800"
ROW = {"prompt": "a", "completion": "b"}
MBPP = {"task_id": 601, "text": "t", "code": "def f(): return 1", "test_list": ["assert f() == 1"]}
CONTEST = {
    "name": "n", "description": "d", "public_tests": {"input": ["1"], "output": ["1"]},
    "solutions": {"language": [3], "solution": ["print(1)"]},
    "incorrect_solutions": {"language": [3], "solution": ["print(2)"]},
}  # fmt: skip
PAIR = {"problem": "p", "prompt": "", "correct": "1", "incorrect": "2"}
DEFECT = {"task": "t", "faulty": "1", "correct": "2", "fault_location": "1"}


def rows_file(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refused(read, *arguments, **named) -> str:
    """The line with which a reader refuses."""
    with pytest.raises(UserError) as error:
        list(read(*arguments, **named))
    assert "\n" not in str(error.value) and str(error.value).isprintable()
    return str(error.value)


@contextmanager
def as_nobody():
    """As a user who may read only what everybody may."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


# ----------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?", "run{1,2}", "r**n", "a=b", "~run", "caf\udce9"])
def test_a_name_is_no_pattern(name, tmp_path):
    for other in ("run1", "run2", "runs", "rn", "b"):
        pq.write_table(pa.table({"prompt": ["other"], "completion": ["x"]}), tmp_path / f"{other}.parquet")
    with (tmp_path / f"{name}.parquet").open("wb") as file:
        pq.write_table(pa.table({"prompt": ["own"], "completion": ["x"]}), file)
    sources = [{"source": str(tmp_path / f"{name}.parquet")}, {"source": str(tmp_path), "split": name}]
    for source in sources:
        [document] = prompt_completion(TOKENIZER, **source)
        assert bytes(document.prompt) == b"own"
        document.id.encode()  # a name that is no UTF-8 is shown with escapes
        [(_, streamed)] = prompt_completion_stream(TOKENIZER, **source).read()
        assert bytes(streamed.prompt) == b"own"
    assert count_rows(tmp_path / f"{name}.parquet") == 1


def test_a_folder_is_no_file_of_its_split(tmp_path):
    (tmp_path / "train.jsonl").mkdir()
    assert refused(read_rows, tmp_path / "train.jsonl").endswith(
        "set split to the name of one of its files, or source to a file"
    )
    assert "has no train.jsonl|" in refused(read_rows, tmp_path, "train")


@pytest.fixture
def everybodys():
    """A folder that other users reach, which pytest's own is not."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_what_this_user_may_not_read_is_one_line(everybodys):
    source = rows_file(everybodys / "d.jsonl", ROW)
    pq.write_table(pa.table({"prompt": ["a"]}), everybodys / "d.parquet")
    (everybodys / "code").mkdir()
    (everybodys / "code" / "m.py").write_text("x = 1\n")
    for name in ("d.jsonl", "d.parquet", "code/m.py"):
        (everybodys / name).chmod(0)
    with as_nobody():
        for read in (read_rows, count_rows):
            for name in ("d.jsonl", "d.parquet"):
                with pytest.raises(UserError, match=rf"{name} cannot be read: Permission denied; give this user"):
                    list(read(everybodys / name))
        assert "m.py cannot be read: Permission denied" in refused(
            python_functions, TOKENIZER, root=str(everybodys / "code")
        )
    (everybodys / "code").chmod(0)
    everybodys.chmod(0o700)
    with as_nobody():
        assert "cannot be read: Permission denied" in refused(read_rows, source)


def test_a_fault_of_the_disk_has_another_way_out(tmp_path):
    def full():
        with reading("s3://bucket/d.jsonl"):
            Path("/dev/full").write_text("what the cache should hold")

    def gone():
        with reading(tmp_path / "d.jsonl"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    lost = "/proc/self/mem"  # whose first bytes cannot be read
    for read, cause in (
        (full, ": no space left on the disk ("),
        (gone, f"{tmp_path / 'd.jsonl'}: the network file system has lost the file ("),
        (lambda: list(read_rows(lost)), f"{lost}: the disk or the network file system does not answer ("),
    ):
        line = refused(read)
        assert cause in line and line.endswith(" MB free); mend that, or name another source")
    with pytest.raises(CheckpointError, match=rf"^{lost}: the disk .*; mend that, or copy it again$"):
        read_json(Path(lost))


# ----------------------------------------------------------------------------------------------------------------------
# Bytes


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "array.json"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_mark_before_the_text_and_other_line_ends_change_nothing(name, end, tmp_path):
    rows = [{"prompt": "a\r\nb", "completion": "é"}, ROW]
    text = end.join(["[", json.dumps(rows[0]) + ",", json.dumps(rows[1]), "]"]) if name == "array.json" else ""
    text = text or "".join(json.dumps(row) + end for row in rows)
    content = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [row for _, row in read_rows(tmp_path / name)] == rows
    assert count_rows(tmp_path / name) == (None if name == "array.json" else 2)


DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a\x00"}', ":2: malformed JSON: Invalid control character at column 14"),
        (b"\x00" * 40, ":2: malformed JSON: Expecting value"),
        (DEEP, ":2: JSON that is nested too deeply to be read"),
        (b'{"prompt": "a", "prompt": "b"}', ":2: malformed JSON: the key 'prompt' is there twice"),
        (b'{"prompt": {"a": 1, "a": 1}}', ":2: malformed JSON: the key 'a' is there twice"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", ":2: malformed JSON: Exceeds the limit"),
        ('{"prompt": "a"}'.encode("utf-16"), ": not readable as UTF-8 text"),
    ],
)
def test_json_that_cannot_be_read_is_named_by_its_line(line, message, tmp_path):
    (tmp_path / "d.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n" + line + b"\n")
    assert f"d.jsonl{message}" in refused(read_rows, tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion": None}, "field 'completion' is null; give it a value, or leave the row out"),
        ({"completion": 3}, "field 'completion' must be a string, got int 3"),
        (
            {"completion": f"ab{HALF}c"},
            "field 'completion' holds half a character, '\\ud800' at place 2, which is no Unic",
        ),
        ({"prompt": "\udfff"}, "field 'prompt' holds half a character, '\\udfff' at place 0"),
        ({"reference_ce": [0.0, float("nan"), 1.0]}, "reference_ce[1] must be a finite number, got nan"),
        ({"reference_ce": [0.0, float("inf"), 1.0]}, "reference_ce[1] must be a finite number, got inf"),
        ({"reference_ce": [0.0, 0.0, 10**400]}, "reference_ce[2] must be a finite number, got 1000"),
        ({"reference_ce": [0.0, 0.0, 1e39]}, "reference_ce[2] must be a finite number, got 1e+39"),
        ({"reference_ce": [0.0, 0.0, True]}, "reference_ce[2] must be a finite number, got True"),
        (
            {"referense_ce": [0.0, 0.0, 0.0]},
            "nobody reads the column 'referense_ce'; did you mean 'reference_ce'? Set reference_ce_column, ",
        ),
    ],
)
def test_a_field_that_cannot_be_used_is_named(changes, message, tmp_path):
    source = rows_file(tmp_path / "d.jsonl", ROW, ROW | changes)
    assert f"d.jsonl:2: {message}" in refused(prompt_completion, TOKENIZER, source=source)


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (tokenized, {"tokens": [1], "lables": [1]}, "nobody reads the column 'lables'; did you mean 'labels'?"),
        (tokenized, {"tokens": [1], "value": [1.0]}, "did you mean 'values'?"),
        (tokenized, {"tokens": None}, "field 'tokens' is null"),
        (mbpp, MBPP | {"code": f"'{HALF}'"}, "field 'code' holds half a character"),
        (mbpp, MBPP | {"test_list": [f"assert '{HALF}'"]}, "test_list[0] holds half a character"),
        (mbpp, MBPP | {"task_id": True}, "field 'task_id' must be a whole number, got bool True"),
        (jsonl_pairs, PAIR | {"correct": HALF}, "field 'correct' holds half a character"),
        (jsonl_pairs, {**PAIR, "correct": None}, "field 'correct' is null"),
        (
            jsonl_pairs,
            {"problem": "p", "prompt": "", "completion": None, "is_correct": True},
            "field 'completion' is null",
        ),
        (jsonl_pairs, PAIR | {"faultline": 1}, "did you mean 'fault_line'?"),
        (jsonl_pairs, {"problem": "p", "prompt": "", "completion": "c", "rewards": 1}, "did you mean 'reward'?"),
        (
            jsonl_pairs,
            {"problem": "p", "prompt": "", "completion": "c", "reward": 10**400},
            "'reward' must be a finite",
        ),
        (condefects_pairs, DEFECT | {"faulty": HALF}, "field 'faulty' holds half a character"),
        (condefects_pairs, DEFECT | {"correct": None}, "field 'correct' is null"),
        (code_contests_pairs, CONTEST | {"description": HALF}, "field 'description' holds half a character"),
        (code_contests_pairs, CONTEST | {"cf_tags": "greedy"}, "field 'cf_tags' must be a list, got str"),
        (code_contests_pairs, CONTEST | {"cf_rating": "high"}, "field 'cf_rating' must be a whole number, got str"),
        (
            code_contests_pairs,
            CONTEST | {"solutions": {"language": [3], "solution": [None]}},
            "field 'solutions': field 'solution' must be a list of strings, got [None]",
        ),
        (code_contests, CONTEST | {"description": None}, "field 'description' is null"),
        (
            code_contests,
            CONTEST | {"time_limit": {"seconds": float("inf")}},
            "time_limit must be null or {seconds, nanos}",
        ),
        (code_contests, CONTEST | {"memory_limit": 1}, "did you mean 'memory_limit_bytes'?"),
        (assertion_tasks, MBPP | {"code": "-" * 50_000 + "1"}, "field 'code' is nested too deeply for Python to parse"),
        (assertion_tasks, MBPP | {"text": HALF}, "field 'text' holds half a character"),
        (assertion_tasks, MBPP | {"test_import": ["import os"]}, "did you mean 'test_imports'?"),
        (mbpp_tasks, MBPP | {"task_id": 11, "code": None}, "field 'code' is null"),
    ],
)
def test_every_reader_names_what_it_cannot_use(read, row, message, tmp_path):
    first = (TOKENIZER,) if read in (tokenized, mbpp) else ()
    source = rows_file(tmp_path / "d.jsonl", row)
    named = {"split": None} if read in (jsonl_pairs, condefects_pairs, code_contests_pairs, code_contests) else {}
    line = refused(read, *first, source=source, **named)
    assert "d.jsonl:1" in line and message in line


@pytest.mark.parametrize(
    ("read", "row", "columns"),
    [
        (prompt_completion, ROW, {"reference": "gold", "references": ["gold", "other"]}),
        (tokenized, {"tokens": [1]}, {"label": 3, "value": 0.5, "token": "a", "tokenized": ["a"], "vocabhash": 1}),
        (jsonl_pairs, PAIR, {"rewards": [1.0], "is_correct_": "yes", "fault_lines": [1]}),
        (assertion_tasks, MBPP, {"test_import": "", "test_setup_codes": [], "challenge_test_lists": {}}),
        (code_contests, CONTEST, {"memory_limit": "256 MB", "time_limits": [1], "private_test": None}),
    ],
)
def test_a_column_of_another_type_is_not_taken_for_a_misspelt_one(read, row, columns, tmp_path):
    first = (TOKENIZER,) if read in (prompt_completion, tokenized) else ()
    found = read(*first, source=rows_file(tmp_path / "d.jsonl", row | columns), split=None)
    assert set(columns) <= set(getattr(found, "unread", columns))


def test_a_misspelt_column_that_is_null_at_first_and_one_that_the_data_keeps(tmp_path):
    scored = {"referense_ce": [0.0, 1.0, 2.0]}
    source = rows_file(tmp_path / "d.jsonl", ROW | {"referense_ce": None}, ROW | scored)
    assert "d.jsonl:2: nobody reads the column 'referense_ce'" in refused(prompt_completion, TOKENIZER, source=source)
    kept = prompt_completion(TOKENIZER, source=source, reference_ce_column=None)
    assert kept.signals == () and kept.unread == ("referense_ce",)
    source = rows_file(tmp_path / "d.jsonl", ROW | scored)
    assert prompt_completion(TOKENIZER, source=source, reference_ce_column="referense_ce").signals == ("reference_ce",)


def test_an_id_is_a_name_whatever_its_value_and_a_misspelt_id_column_is_refused(tmp_path):
    source = rows_file(tmp_path / "d.jsonl", *[ROW | {"id": i} for i in (0, None, "", 7)])
    names = ["0", f"{source}:2", f"{source}:3", "7"]
    assert [document.id for document in prompt_completion(TOKENIZER, source=source)] == names
    assert [document.id for _, document in prompt_completion_stream(TOKENIZER, source=source).read()] == names
    places = [document.id for document in prompt_completion(TOKENIZER, source=source, id_column=None)]
    assert places == [f"{source}:{line}" for line in (1, 2, 3, 4)]
    tokens = rows_file(tmp_path / "t.jsonl", {"tokens": [1], "id": 0})
    assert tokenized(TOKENIZER, source=tokens)[0].id == "0"
    for read, of in ((prompt_completion, source), (prompt_completion_stream, f"the first 1,000 rows of {source}")):
        with pytest.raises(UserError) as error:
            read(TOKENIZER, source=source, id_column="idd")
        line = f"id_column is 'idd', which no row of {of} has; its columns are prompt, completion, id"
        assert str(error.value) == line
    later = rows_file(tmp_path / "l.jsonl", ROW, ROW | {"name": "n"})
    stream = prompt_completion_stream(TOKENIZER, source=later, id_column="name")
    assert [document.id for _, document in stream.read()] == [f"{later}:1", "n"]


def test_samples_may_hold_what_a_model_wrote_but_no_misspelt_column(tmp_path):
    tasks = assertion_tasks(rows_file(tmp_path / "tasks.jsonl", MBPP))
    sample = {"task_id": 601, "solution": HALF}
    [read] = read_samples(rows_file(tmp_path / "s.jsonl", sample), tasks)
    assert read.solution == HALF
    for wrong, message in (
        ({"temprature": 0.2}, "s.jsonl:1: nobody reads the column 'temprature'; did you mean 'temperature'?"),
        ({"temperature": 10**400}, "temperature must be a number >= 0"),
    ):
        assert message in refused(read_samples, rows_file(tmp_path / "s.jsonl", sample | wrong), tasks)


# ----------------------------------------------------------------------------------------------------------------------
# Parquet


def test_parquet_columns_of_any_layout_are_read_as_what_they_mean(tmp_path):
    text = pa.array(["a", "é", "a"])
    table = {"prompt": text.dictionary_encode(), "completion": text.cast(pa.large_string())}
    table["reference_ce"] = pa.array([[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2]], pa.list_(pa.float16()))
    table["more"] = pa.array([{"deep": [{"er": 1}]}] * 3)
    pq.write_table(pa.table(table), tmp_path / "d.parquet", row_group_size=1)
    documents = prompt_completion(TOKENIZER, source=str(tmp_path / "d.parquet"))
    assert [bytes(d.prompt).decode() for d in documents] == ["a", "é", "a"]
    assert documents[1].signals["reference_ce"].tolist() == [0, 1, 2, 3, 4]
    assert documents.unread == ("more",)


def test_parquet_that_cannot_be_used_is_named(tmp_path):
    def written(table) -> str:
        pq.write_table(table, tmp_path / "d.parquet")
        return str(tmp_path / "d.parquet")

    cases = {
        "d.parquet: the dataset is empty": pa.table({"prompt": pa.array([], pa.string())}),
        "d.parquet: row 1: field 'completion' is missing; the row has prompt": pa.table({"prompt": ["a"]}),
        "d.parquet: row 2: field 'completion' is null": pa.table({"prompt": ["a", "b"], "completion": ["a", None]}),
        "d.parquet: row 1: field 'completion' must be a string, got list": pa.table(
            {"prompt": ["a"], "completion": [["a"]]}
        ),
        "d.parquet: row 1: field 'completion' must be a string, got bytes": pa.table(
            {"prompt": ["a"], "completion": [b"a"]}
        ),
        "d.parquet: the column 'prompt' is there twice": pa.table([["a"], ["b"]], names=["prompt", "prompt"]),
    }
    for message, table in cases.items():
        assert message in refused(prompt_completion, TOKENIZER, source=written(table))
    source = written(pa.table({"prompt": ["a" * 999], "completion": ["b"]}))
    whole = (tmp_path / "d.parquet").read_bytes()
    for torn in (b"", b"PAR1", whole[:-20], whole[:40] + b"\xff" * 40 + whole[80:]):
        (tmp_path / "d.parquet").write_bytes(torn)
        assert "d.parquet: not readable as parquet: " in refused(prompt_completion, TOKENIZER, source=source)


# ----------------------------------------------------------------------------------------------------------------------
# Columns


def test_a_column_that_the_config_names_must_be_there(tmp_path):
    source = rows_file(tmp_path / "d.jsonl", ROW | {"ref": [0, 0, 0], "name": "x"})
    options = {"source": source, "reference_ce_column": "ref", "id_column": "name"}
    [document] = prompt_completion(TOKENIZER, **options)
    assert (document.id, document.signals["reference_ce"].tolist()) == ("x", [0, 0, 0])
    line = refused(prompt_completion, TOKENIZER, **(options | {"reference_ce_column": "my_ref"}))
    assert (
        f"reference_ce_column is 'my_ref', which no row of {source} has; its columns are prompt, completion, ref, name"
        in line
    )
    assert "id_column is 'title'" in refused(prompt_completion, TOKENIZER, **(options | {"id_column": "title"}))
    [plain] = prompt_completion(
        TOKENIZER, source=rows_file(tmp_path / "e.jsonl", ROW | {"idx": 3})
    )  # no score: no harm
    assert plain.id.endswith("e.jsonl:1")


def test_columns_that_nobody_reads_are_said_once(tmp_path):
    rows = [
        ROW | {"reference_ce": [0, 0, 0], "reference_cee": [1, 1, 1]},
        ROW | {"reference_ce": [0, 0, 0], "topic": "x"},
    ]
    data = pack(prompt_completion(TOKENIZER, source=rows_file(tmp_path / "d.jsonl", *rows)), 4, pad_id=TOKENIZER.pad_id)
    assert data.summary({"reference_ce"}).endswith("75.0% full (columns not read: reference_cee, topic)")
    assert data.summary(()).endswith("(columns not read: reference_ce, reference_cee, topic)")
    pairs = jsonl_pairs(rows_file(tmp_path / "p.jsonl", PAIR | {"author": "me"}))
    assert pairs.summary().endswith("p.jsonl: 1 pairs (columns not read: author)")
    stream = tokenized_stream(TOKENIZER, source=rows_file(tmp_path / "t.jsonl", {"tokens": [1], "lables": [1]}))
    assert "did you mean 'labels'?" in refused(stream.read)


# ----------------------------------------------------------------------------------------------------------------------
# Python


def test_modules_of_any_depth_and_name(tmp_path):
    documented = 'def {}(x):\n    """Doc."""\n'
    arms = "".join(f"    elif x == {i}:\n        return {i}\n" for i in range(1, 3000))
    shallow = "".join(f"    elif x == {i}:\n        return {i}\n" for i in range(1, 1200))
    start = "    if x == 0:\n        return 0\n"
    (tmp_path / "deep.py").write_text(documented.format("deep") + start + arms)
    (tmp_path / "less.py").write_text(documented.format("less") + start + shallow)
    inside = "x = 1\nif x == 0:\n    pass\n" + "".join(f"elif x == {i}:\n    pass\n" for i in range(1, 1200))
    last = "    def last(x):\n        '''Doc.'''\n        return x\n"
    (tmp_path / "nested.py").write_text(f"{inside}else:\n{last}")
    (tmp_path / os.fsdecode(b"caf\xe9.py")).write_text(documented.format("f") + "    return 'f'\n")
    documents = python_functions(TOKENIZER, root=str(tmp_path), split="all")
    assert {d.id for d in documents} == {"less.py:1:less", "nested.py:2403:last", "caf\\udce9.py:1:f"}
    assert documents.skipped["modules that Python cannot parse (the first is deep.py)"] == 1
    line = pack(documents, 100_000, pad_id=TOKENIZER.pad_id).summary()
    assert "3 documents" in line and "left out: 1 modules that Python cannot parse (the first is deep.py)" in line
