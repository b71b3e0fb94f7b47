"""Pairs of a correct and an incorrect program for one problem, from which the critic learns values.

A builder is a plain function ``builder(**config keys) -> Pairs``, named as `_component_` in a config; it reads text,
which wmtp.critic.pair_dataset tokenizes. Every builder brings programs to LF line ends. It leaves out, and counts,
empty programs, repeated ones, and pairs whose programs differ only in white space at the end.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from wmtp.critic.pair_dataset import Pair, Pairs
from wmtp.data.columns import ReadColumns
from wmtp.data.contest_rows import PYTHON3, alphacode_prompt, programs_of, topics, whole_number
from wmtp.data.mbpp_rows import mbpp_prompt
from wmtp.data.packaged import packaged_functions, packaged_programs
from wmtp.data.rows import is_number, lf, read_rows, take
from wmtp.errors import UserError
from wmtp.numerics.keyed import text_hash

_NO_PROGRAM, _SAME = "empty programs", "pairs of the same program"
_REPEATED, _BOTH = "repeated programs or pairs", "programs given as correct and as incorrect"
_BOTH_SIDES = ("solutions", "incorrect_solutions")  # columns of CodeContests
_JUDGED = {"is_correct": bool, "reward": float, "fault_line": int}  # columns of one's own rows that may be left out


def packaged_pairs() -> Pairs:
    """The small tasks that ship with the package: 36 functions and 12 programs.

    The prompt of a function is a docstring of the task and its tests, that of a program is CodeContests' (see
    :func:`wmtp.data.contest_rows.alphacode_prompt`).
    """
    builder = _Builder("packaged pairs")
    for row in packaged_functions():
        pair = Pair(f"function/{row['task_id']}", mbpp_prompt(row), row["code"], row["wrong_code"], row["fault_line"])
        builder.add(pair)
    for row in packaged_programs():
        builder.add_programs(*_contest_problem(row, f"packaged program {row['name']}", PYTHON3))
    return builder.done()


def condefects_pairs(source: str, split: str | None = None) -> Pairs:
    """ConDefects (Wu et al. 2023, arXiv 2310.16253): AtCoder submissions, each with its author's later, accepted one.

    The data has no problem statement: the prompt is empty. A fault_location outside the program's lines (something is
    missing before or after them) gives no fault_line.

    Args:
        source: a JSONL file (.gz too), or a folder of them. Rows: task, faulty, correct, fault_location (a line number
            of `faulty`, from 1, as text).
        split: the name of one file of a folder; None: all its files.

    Raises:
        FileNotFoundError, ValueError: source unreadable, or a wrong row; the message names file and line.
    """
    builder = _Builder(f"condefects pairs of {source}")
    columns = ("task", "faulty", "correct", "fault_location")
    rows = ReadColumns(read_rows(source, split or "all"), {}, columns)
    for where, row in rows:
        task, faulty, correct, at = (take(row, where, column, str) for column in columns)
        if not at.strip().isdecimal():
            raise UserError(f"{where}: field 'fault_location' must be a line number, got {at!r:.60}")
        inside = 1 <= int(at) <= _num_lines(faulty)
        builder.add(Pair(task, "", correct, faulty, int(at) if inside else None))
    return builder.done(rows)


def code_contests_pairs(
    source: str = "deepmind/code_contests",
    split: str | None = "train",
    subset: str | None = None,
    *,
    language: int = PYTHON3,
    max_pairs_per_problem: int = 16,
    max_problems: int | None = None,
    skip_one_class: bool = False,
    seed: int = 0,
) -> Pairs:
    """CodeContests (Li et al. 2022, arXiv 2203.07814): `solutions` against `incorrect_solutions` of each problem.

    Args:
        source: the hub name, a JSONL or parquet file with the dataset's fields, or a folder with `{split}` of these.
        split: ``train``, ``valid`` or ``test`` of the hub; the name of one file of a folder; unused for a file.
        subset: of a hub dataset.
        language: the dataset's number of the programming language; by default 3, Python 3.
        max_pairs_per_problem: keep so many; programs are paired in a random order, each as often as the others.
        max_problems: read only so many problems that give a pair.
        skip_one_class: leave out, and count, problems without a correct or without an incorrect program.
        seed: of the order in which programs are paired.

    Raises:
        FileNotFoundError, ValueError: source unreadable, a wrong row, or a problem of one class.
    """
    builder = _Builder(f"code_contests pairs of {source}", max_pairs_per_problem, skip_one_class, seed)
    if max_problems is not None and max_problems < 1:
        raise UserError(f"max_problems must be >= 1 or null, got {max_problems}")
    known = ("name", "description", *_BOTH_SIDES, "cf_tags", "cf_rating")
    rows = ReadColumns(read_rows(source, split, subset), {}, known)
    for where, row in rows:
        builder.add_programs(*_contest_problem(row, where, language))
        if max_problems is not None and len(builder.problems) == max_problems:
            break
    return builder.done(rows)


def jsonl_pairs(
    source: str,
    split: str | None = None,
    subset: str | None = None,
    *,
    reward_threshold: float = 0.5,
    max_pairs_per_problem: int = 16,
    skip_one_class: bool = False,
    seed: int = 0,
) -> Pairs:
    """Your own data: rows that are pairs, or labelled completions, which are then paired.

    A pair is {problem, prompt, correct, incorrect}, with an optional fault_line. A labelled row is {problem, prompt,
    completion} with is_correct (true or false), or reward (a number; above `reward_threshold` is correct), or both.
    `mse` losses learn the reward; without one they learn 1 for correct and 0 for incorrect.

    Args:
        source: a JSON, JSONL (.gz too) or parquet file, a folder with `{split}.jsonl`, or a hub name.
        split, subset: of a folder or a hub dataset.
        reward_threshold: see above.
        max_pairs_per_problem, skip_one_class, seed: of labelled rows, as in :func:`code_contests_pairs`.

    Raises:
        FileNotFoundError, ValueError: source unreadable, a wrong row (the message names file and line), a reward that
            is not finite, or a problem of one class.
    """
    builder = _Builder(f"pairs of {source}", max_pairs_per_problem, skip_one_class, seed)
    labelled: dict[str, _Programs] = {}
    known = ("problem", "prompt", "correct", "incorrect", "completion")
    rows = ReadColumns(read_rows(source, split, subset), _JUDGED, known)
    for where, row in rows:
        problem, prompt = _problem_id(row, where), take(row, where, "prompt", str)
        if row.get("completion") is None and ("completion" not in row or row.get("correct") is not None):
            correct, incorrect = take(row, where, "correct", str), take(row, where, "incorrect", str)
            builder.add(Pair(problem, prompt, correct, incorrect, _fault_line(row, where)))
            continue
        programs = labelled.setdefault(problem, _Programs(problem, prompt, [], []))
        if lf(programs.prompt) != lf(prompt):
            raise UserError(f"{where}: problem {problem!r} has another prompt here than in its first row")
        reward = _reward(row, where)
        good = reward > reward_threshold if row.get("is_correct") is None else take(row, where, "is_correct", bool)
        reward = float(good) if reward is None else reward
        (programs.correct if good else programs.incorrect).append((take(row, where, "completion", str), reward))
    for programs in labelled.values():
        builder.add_programs(programs, str(source))
    return builder.done(rows)


# ----------------------------------------------------------------------------------------------------------------------
# From rows to pairs


@dataclass
class _Programs:
    problem: str
    prompt: str
    correct: list[tuple[str, float]]
    incorrect: list[tuple[str, float]]


class _Builder:
    """A collection of pairs that leaves out, and counts, what cannot be one."""

    def __init__(self, name: str, max_pairs_per_problem: int = 16, skip_one_class: bool = False, seed: int = 0) -> None:
        if isinstance(max_pairs_per_problem, bool) or max_pairs_per_problem < 1:
            raise UserError(f"max_pairs_per_problem must be >= 1, got {max_pairs_per_problem}")
        self.name, self.skipped, self.problems = name, Counter(), set()
        self._max, self._skip_one_class, self._seed = max_pairs_per_problem, skip_one_class, seed
        self._pairs: list[Pair] = []
        self._seen: set[tuple[str, str, str]] = set()

    def add(self, pair: Pair) -> None:
        """Adds a pair, unless a program is empty, both are the same, or the pair is there already."""
        pair = replace(pair, prompt=lf(pair.prompt), correct=lf(pair.correct), incorrect=lf(pair.incorrect))
        key = (pair.problem, pair.correct, pair.incorrect)
        if not pair.correct.strip() or not pair.incorrect.strip():
            self.skipped[_NO_PROGRAM] += 1
        elif pair.correct.rstrip() == pair.incorrect.rstrip():
            self.skipped[_SAME] += 1
        elif key in self._seen:
            self.skipped[_REPEATED] += 1
        else:
            self._seen.add(key)
            self.problems.add(pair.problem)
            self._pairs.append(pair)

    def add_programs(self, programs: _Programs, where: str) -> None:
        """Adds pairs of a problem's correct and incorrect programs, up to max_pairs_per_problem."""
        correct, incorrect = self._distinct(programs.correct), self._distinct(programs.incorrect)
        for text in correct.keys() & incorrect.keys():  # nobody can tell which of the two is right
            del correct[text], incorrect[text]
            self.skipped[_BOTH] += 1
        if not correct or not incorrect:
            if not self._skip_one_class:
                raise UserError(
                    f"{where}: problem {programs.problem!r} has {len(correct)} correct and {len(incorrect)} incorrect "
                    "programs, a pair needs one of each; set skip_one_class: true to leave such problems out"
                )
            self.skipped["problems of one class"] += 1
            return
        by_hash = lambda text: text_hash(f"{self._seed} {programs.problem}", text)
        first, second = sorted(correct, key=by_hash), sorted(incorrect, key=by_hash)
        for i, j in _combinations(len(first), len(second), self._max):
            good, bad = first[i], second[j]
            self.add(Pair(programs.problem, programs.prompt, good, bad, None, correct[good], incorrect[bad]))

    def done(self, rows: ReadColumns | None = None) -> Pairs:
        skipped = {reason: count for reason, count in self.skipped.items() if count}
        return Pairs(self.name, tuple(self._pairs), skipped, () if rows is None else rows.unread)

    def _distinct(self, programs: Iterable[tuple[str, float]]) -> dict[str, float]:
        """Returns the rewards by program, each text once; the first reward of a text stays."""
        found: dict[str, float] = {}
        for text, reward in programs:
            text = lf(text)
            if not text.strip():
                self.skipped[_NO_PROGRAM] += 1
            elif text in found:
                self.skipped[_REPEATED] += 1
            else:
                found[text] = reward
        return found


def _combinations(first: int, second: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yields up to `limit` of the first x second index pairs, none twice; uses of an index differ by at most one.

    It walks along diagonals, (0, 0), (1, 1), ...; once both indices are back at 0, the second moves on by one.
    """
    period = math.lcm(first, second)
    for k in range(min(limit, first * second)):
        yield k % first, (k + k // period) % second


def _contest_problem(row: dict, where: str, language: int) -> tuple[_Programs, str]:
    name, description = take(row, where, "name", str), take(row, where, "description", str)
    prompt = alphacode_prompt(
        description, rating=whole_number(row, where, "cf_rating"), tags=topics(row, where, "cf_tags")
    )
    correct, incorrect = (programs_of(row, where, column, language) for column in _BOTH_SIDES)
    both = [(text, 1.0) for text in correct], [(text, 0.0) for text in incorrect]
    return _Programs(name, prompt, *both), where


def _problem_id(row: dict, where: str) -> str:
    found = row.get("problem")
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    if found == "":
        raise UserError(f"{where}: field 'problem' is empty; give each problem an id")
    return take(row, where, "problem", str)


def _reward(row: dict, where: str) -> float | None:
    reward = row.get("reward")
    if reward is None:
        if row.get("is_correct") is None:
            raise UserError(
                f"{where}: the row has a completion, but neither is_correct nor reward; it has {', '.join(row)}"
            )
        return None
    if not is_number(reward):
        raise UserError(f"{where}: field 'reward' must be a finite number, got {reward!r:.60}")
    return float(reward)


def _fault_line(row: dict, where: str) -> int | None:
    if row.get("fault_line") is None:
        return None
    line, count = take(row, where, "fault_line", int), _num_lines(row["incorrect"])
    if not 1 <= line <= count:
        raise UserError(f"{where}: fault_line must be a line of the incorrect program, 1 to {count}, got {line}")
    return line


def _num_lines(program: str) -> int:
    return len(lf(program).removesuffix("\n").split("\n"))
