"""Packed rows that are kept: the same as in memory, made once, and never read where they are not whole."""

import json
import os
import re
import resource
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from processes import start

from wmtp.data import Document, Documents, comes_from, document_from_text, pack, save_tokenized
from wmtp.data.documents import collect, collecting
from wmtp.errors import UserError, line_for_user
from wmtp.files import MANIFEST, write_manifest
from wmtp.pretrained import byte_tokenizer
from wmtp.training.packed_data import packed_data, read_packed, write_packed

TOKENIZER = byte_tokenizer()
SEQ_LEN = 32


@pytest.fixture
def rows(tmp_path):
    """A file of 300 rows, with one column that all rows have, and one that the last one lacks."""
    made = []
    for i in range(300):
        row = {"prompt": f"q{i}", "completion": "é" * (i % 20), "id": f"r{i}"}
        tokens = len(document_from_text(TOKENIZER, row["prompt"], row["completion"], ""))
        row |= {"noise": [i / 7] * tokens, "some": [1.0] * tokens}
        made.append(row)
    made[-1].pop("some")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def section(builder, **keys):
    return OmegaConf.create({"_component_": builder if "." in builder else f"wmtp.data.{builder}", **keys})


def packed(data, cache, tokenizer=TOKENIZER, **changes):
    settings = {"seq_len": SEQ_LEN, "packed": True, "workers": 1, "cache": None if cache is None else str(cache)}
    return packed_data(data, tokenizer, "dataset", **settings | changes)


def whole(column):
    return column.index_select(0, torch.arange(column.shape[0]))


def assert_same(one, other):
    for field in fields(one):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if field.name == "ids":
            ours, theirs = ours.to_pylist(), theirs.to_pylist()
        if field.name in ("tokens", "labels", "document_ids"):
            ours, theirs = whole(ours), whole(theirs)
        if isinstance(ours, torch.Tensor | np.ndarray):
            assert ours.dtype == theirs.dtype
            ours, theirs = ours.tolist(), theirs.tolist()
        if field.name == "signals":
            ours, theirs = ({name: whole(column).tolist() for name, column in side.items()} for side in (ours, theirs))
        assert ours == theirs, field.name


def entries(cache):
    return sorted(path for path in cache.iterdir() if path.is_dir())


@pytest.mark.parametrize("builder", ["prompt_completion", "tokenized", "mbpp", "python_functions"])
@pytest.mark.parametrize("one_each", [False, True])
def test_kept_rows_are_those_in_memory_bit_for_bit(builder, one_each, rows, tmp_path):
    source = {"source": str(rows)}
    if builder == "tokenized":
        documents = Documents("d", (document_from_text(TOKENIZER, "question", "answer", "d"),) * 20)
        save_tokenized(documents, tmp_path / "tokens.jsonl", TOKENIZER)
        source = {"source": str(tmp_path / "tokens.jsonl")}
    elif builder == "mbpp":
        task = {"text": "Add.", "code": "def f(a):\n    return a\n", "test_list": ["assert f(1) == 1"]}
        lines = (json.dumps({"task_id": i, **task}) for i in range(601, 640))
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        source = {"source": str(tmp_path), "split": "train"}
    elif builder == "python_functions":
        (tmp_path / "tree").mkdir()
        body = "".join(f'def f{i}(a):\n    """Add."""\n    return a + {i}\n\n\n' for i in range(50))
        (tmp_path / "tree" / "module.py").write_text(body)
        source = {"root": str(tmp_path / "tree"), "split": "all"}
    data, how = section(builder, **source), {"packed": not one_each}
    in_memory = packed(data, None, **how)
    made, read = (packed(data, tmp_path / "cache", workers=workers, **how) for workers in (3, 1))
    assert len(entries(tmp_path / "cache")) == 1
    assert_same(made, in_memory)
    assert_same(read, in_memory)
    assert set(read.signals) == ({"noise"} if builder == "prompt_completion" else set())
    batch, expected = (side.batch([1, 0], size=3) for side in (read, in_memory))
    assert all(torch.equal(batch[name], expected[name]) for name in ("tokens", "labels", "document_ids"))
    assert read.row_ids(1) == in_memory.row_ids(1) and read.summary() == in_memory.summary()


def test_threads_make_the_same_documents_and_name_the_first_wrong_row(rows):
    def wrong(i):
        raise UserError(f"row {i} is wrong")

    def makers(bad=()):
        for i in range(1000):
            yield lambda i=i: wrong(i) if i in bad else document_from_text(TOKENIZER, "q" * (i % 7), f"{i}", f"d{i}")

    expected = collect(makers())
    with collecting(workers=4):
        assert [(d.id, d.tokens.tolist()) for d in collect(makers())] == [(d.id, d.tokens.tolist()) for d in expected]
        with pytest.raises(UserError, match="row 301 is wrong"):
            collect(makers(bad=(301, 302, 600)))


MADE = Path("made.txt")  # in the working folder: one line for each time that a builder below has run


@comes_from(lambda arguments: arguments["state"])
def counted(tokenizer, *, state: str, until: str | None = None) -> Documents:
    """Documents of a source whose state the config says; it waits until a file is there."""
    with MADE.open("a") as file:
        file.write(f"{state}\n")
    while until is not None and not os.path.exists(until):
        time.sleep(0.02)
    makers = (lambda i=i: document_from_text(tokenizer, "q", f"{state} {i}", f"d{i}") for i in range(200))
    return Documents("counted", collect(makers))


def unknown(tokenizer, *, source: str) -> Documents:
    """Documents of a builder that does not say what it reads."""
    return Documents("unknown", (document_from_text(tokenizer, "q", source, "d"),))


def test_rows_are_made_again_only_where_something_that_they_depend_on_has_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, cache = section(f"{__name__}.counted", state="a"), tmp_path / "cache"
    for _ in range(3):
        packed(data, cache)
    packed(data, cache, workers=4)
    assert MADE.read_text() == "a\n"
    other = byte_tokenizer()
    other.eos_id = other.bos_id
    changed = (
        lambda: packed(section(f"{__name__}.counted", state="b"), cache),
        lambda: packed(section(f"{__name__}.counted", state="a", until=str(tmp_path)), cache),
        lambda: packed(data, cache, seq_len=16),
        lambda: packed(data, cache, packed=False),
        lambda: packed(data, cache, tokenizer=other),
        lambda: packed(data, tmp_path / "another"),
    )
    for count, make in enumerate(changed, start=2):
        make()
        assert len(MADE.read_text().split()) == count
    assert other.eos_id in whole(packed(data, cache, tokenizer=other).tokens) and len(MADE.read_text().split()) == count


def test_a_source_counts_by_its_content(rows, tmp_path):
    data, cache = section("prompt_completion", source=str(rows)), tmp_path / "cache"
    first = packed(data, cache)
    os.utime(rows, (0, 0))
    assert packed(data, cache).fingerprint == first.fingerprint and len(entries(cache)) == 1
    text = rows.read_text()
    rows.write_text(text.replace('"q17"', '"p17"'))
    assert packed(data, cache).fingerprint != first.fingerprint and len(entries(cache)) == 2
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.py").write_text('def f(a):\n    """Add."""\n    return a + 1\n')
    functions = section("python_functions", root=str(tree), split="all")
    first = packed(functions, cache)
    (tree / "b.py").write_text('def g(a):\n    """Subtract."""\n    return a - 1\n')
    assert len(packed(functions, cache).members) == 2 * len(first.members)


@pytest.mark.parametrize("kind", ["pipe", "unknown"])
def test_what_can_be_read_only_once_or_says_nothing_of_its_source_is_not_kept(kind, tmp_path):
    if kind == "unknown":
        data = section(f"{__name__}.unknown", source="x")
    else:
        read, write = os.pipe()
        os.write(write, b'{"prompt": "a", "completion": "b"}')
        os.close(write)
        data = section("prompt_completion", source=f"/dev/fd/{read}")
    assert len(packed(data, tmp_path / "cache")) == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda f: _flip(f / "labels.npy"), "the content of labels.npy has changed"),
        (lambda f: os.truncate(f / "tokens.npy", 1000), r"tokens.npy has 1000 bytes, not \d+"),
        (lambda f: (f / "signal_0.npy").unlink(), "signal_0.npy is missing"),
        (lambda f: _flip(f / "ids.arrow"), "the content of ids.arrow has changed"),
        (lambda f: (f / MANIFEST).write_text('{"tokens'), "it has no manifest.json"),
        (lambda f: (f / MANIFEST).unlink(), "it has no manifest.json"),
        (lambda f: (f / MANIFEST).write_text("{}"), "manifest.json does not name document_ids.npy"),
        (lambda f: ((f / "key.json").write_text("{}\n"), write_manifest(f)), "it holds the rows of another key.json"),
    ],
)
def test_what_is_not_whole_is_told_in_one_line_and_made_again(spoil, why, rows, tmp_path, capfd):
    data, cache = section("prompt_completion", source=str(rows)), tmp_path / "cache"
    first = packed(data, None)
    packed(data, cache)
    (folder,) = entries(cache)
    capfd.readouterr()
    spoil(folder)
    assert_same(packed(data, cache), first)
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(rf"dataset: {folder} is not whole: {why}; it is made again", line)
    assert_same(packed(data, cache), first)
    assert capfd.readouterr().err == ""


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("bytes_a_file", [500, 20_000])  # while documents are kept, and while rows are written
def test_a_full_disk_is_one_line_and_leaves_nothing(bytes_a_file, rows, tmp_path):
    data, cache = section("prompt_completion", source=str(rows)), tmp_path / "cache"
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, before[1]))
    try:
        with pytest.raises(OSError) as error:
            packed(data, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    line = line_for_user(error.value)
    assert "the file is larger than the file system or ulimit -f allows" in line and "; make room" in line
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert_same(packed(data, cache), packed(data, None))


def test_a_folder_that_cannot_be_written_has_a_way_out(rows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data_cache: .*file/cache cannot be written \(Not a directory\)"):
        packed(section("prompt_completion", source=str(rows)), tmp_path / "file" / "cache")


def test_the_hash_of_a_source_is_kept_where_that_can_be_and_is_found_again_where_it_is_not_whole(
    rows, tmp_path, monkeypatch
):
    data, cache = section("prompt_completion", source=str(rows)), tmp_path / "cache"
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "hashes"))
    monkeypatch.setattr("wmtp.files._RACY_NS", 0)
    first = packed(data, cache)
    (note,) = (path for path in (tmp_path / "hashes" / "sha256").iterdir() if path.name != "lock")
    for torn in (b"", b"\xff", note.read_bytes()[:-1]):
        note.write_bytes(torn)
        assert packed(data, cache).fingerprint == first.fingerprint and len(entries(cache)) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"WMTP_CACHE: .*file/sha256 cannot be written \(Not a directory\); give it"):
        packed(data, cache)


@comes_from(lambda arguments: Path(arguments["source"]).read_text())
def unsteady(tokenizer, *, source: str) -> Documents:
    """Documents of a file that is written to while it is read."""
    text = Path(source).read_text()
    Path(source).write_text("whole")
    return Documents(source, (document_from_text(tokenizer, "q", text, "d"),))


def test_rows_of_a_source_that_changes_while_it_is_read_are_not_kept(tmp_path):
    source, cache = tmp_path / "source.txt", tmp_path / "cache"
    source.write_text("who")
    data = section(f"{__name__}.unsteady", source=str(source))
    with pytest.raises(UserError, match=r"source.txt changed while it was read; start again"):
        packed(data, cache)
    assert entries(cache) == []
    assert packed(data, cache).num_targets == len("whole") + 1


def make_rows(folder):
    os.chdir(folder)
    sys.path.insert(0, str(Path(__file__).parent))
    packed(section("test_packed_data.counted", state="a", until="go"), "cache")


def test_of_two_runs_at_once_one_makes_the_rows_and_a_killed_one_leaves_none(tmp_path):
    runs = [start(make_rows, str(tmp_path), log=tmp_path / f"{name}.txt") for name in ("first", "second")]
    _wait_for(tmp_path / MADE)
    assert entries(tmp_path / "cache") == []  # nothing that another could read before it is whole
    maker = next(run for run in runs if run.running())
    (tmp_path / "go").touch()
    for run in runs:
        run.join()
    assert maker.members[0].exitcode == 0 and (tmp_path / MADE).read_text() == "a\n"
    assert len(entries(tmp_path / "cache")) == 1


def test_a_kill_in_the_middle_leaves_nothing_that_counts(tmp_path):
    run = start(make_rows, str(tmp_path), log=tmp_path / "log.txt")
    _wait_for(tmp_path / MADE)
    os.kill(run.pids[0], signal.SIGKILL)
    run.join(code=-signal.SIGKILL)
    (tmp_path / "go").touch()
    for folder in (tmp_path / "cache").glob("*.lock"):  # as if it had died while it wrote the rows
        torn = folder.with_suffix(".tmp")
        torn.mkdir()
        (torn / "tokens.npy").write_text("torn")
    start(make_rows, str(tmp_path), log=tmp_path / "log.txt").join()
    assert (tmp_path / MADE).read_text() == "a\na\n" and not list((tmp_path / "cache").glob("*.tmp"))


def _wait_for(path):
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} does not appear"
        time.sleep(0.02)


def test_a_file_that_is_cut_off_meanwhile_ends_the_run_with_one_line(rows, tmp_path):
    dataset = packed(section("prompt_completion", source=str(rows)), tmp_path / "cache")
    (folder,) = entries(tmp_path / "cache")
    os.truncate(folder / "labels.npy", 1000)
    with pytest.raises(UserError, match=r"labels.npy was cut off while it was in use; start again: it is made again"):
        dataset.batch([len(dataset) - 1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_stay_in_their_files(tmp_path):
    """48 MB of rows take no memory of a process that reads them all."""
    tokens = np.arange(1000, dtype=np.int32)
    documents = Documents("big", tuple(Document(tokens, tokens, f"d{i}") for i in range(4000)))
    write_packed(documents, 1000, tmp_path, packed=True, pad_id=0, what="dataset")
    before = _resident_memory()
    dataset = read_packed(tmp_path)
    for row in range(4000):
        assert dataset.batch([row])["tokens"][0, -1] == 999
    assert dataset.num_targets == 4000 * 999 and dataset.summary()
    assert _resident_memory() - before < 8e6
    assert_same(dataset, pack(documents, 1000, pad_id=0))


def _resident_memory():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
