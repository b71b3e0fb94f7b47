"""Tasks whose answer is a function judged by Python assertions: MBPP, HumanEval, and files with the fields of either.

A builder is a plain function with config keys as arguments, named as `_component_`; it returns a tuple of tasks.
"""

import ast
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from wmtp.data.columns import ReadColumns
from wmtp.data.mbpp_rows import SPLIT_IDS, mbpp_task
from wmtp.data.packaged import packaged_functions
from wmtp.data.rows import fields_of, lf, read_rows, refuse_unread_tests, take, take_texts
from wmtp.errors import UserError
from wmtp.eval.task_ids import select_tasks
from wmtp.eval.trusted_code import bound_names, called, defined_names, imports_of_tests, parsed, with_calls, with_header
from wmtp.sandbox import AssertionJob, Limits, Outcome

# Columns that tell of tests: those of MBPP, its sanitized edition and MBPP+, and of HumanEval and its relatives.
_MBPP_COLUMNS = frozenset({"test_list", "test_setup_code", "challenge_test_list", "test_imports", "test"})
_CLOSE = "np.allclose(out, exp"  # in MBPP+'s tests
_HUMANEVAL_COLUMNS = frozenset({"test", "example_test"})  # HumanEvalPack's examples are those of the prompt
_LEETCODE_COLUMNS = _HUMANEVAL_COLUMNS | {"input_output"}  # the very cases of its test


@dataclass(frozen=True)
class AssertionTask:
    """One function to write, and the trusted tests that judge it.

    Attributes:
        task_id: unique, as EvalPlus writes it: "Mbpp/11", "HumanEval/0".
        text: what is asked, in words; empty where `prompt` says it all.
        prompt: program text that a completion goes on from; empty where the completion is the whole program.
        entry_point: expression, evaluated after the program, that the tests call `candidate`; None where they call the
            program's functions by their own names only.
        solution: a right completion: `program(solution)` passes; empty where the dataset has none.
        setup: code to run after the program, among its names (MBPP builds trees from the program's classes).
        preamble: code the judge runs before the tests, among theirs: imports, helper functions.
        tests: judged one after the other, all must pass; those of MBPP may be shown in a prompt.
        challenge_tests: judged too, never shown.
        plus_tests: judged last, never shown: EvalPlus's additions, without which a program passes the base tests.
        unused_tests: number of the dataset's tests that are not judged.
        inside: judged with the tests inside the program's process, see :class:`wmtp.sandbox.AssertionJob`.
        apart: each test has the limits for itself, see :class:`wmtp.sandbox.AssertionJob`.
        header: code that the benchmark runs before every program, in its namespace.
        gold_seconds: CPU time that the solution took here, once it was judged (:func:`wmtp.eval.golds.settle_tests`).
    """

    task_id: str
    text: str
    prompt: str
    entry_point: str | None
    solution: str
    setup: str
    preamble: str
    tests: tuple[str, ...]
    challenge_tests: tuple[str, ...] = ()
    plus_tests: tuple[str, ...] = ()
    unused_tests: int = 0
    inside: bool = False
    apart: bool = False
    header: str = ""
    gold_seconds: float | None = None

    def program(self, completion: str) -> str:
        """Returns the program that a plain continuation of the prompt makes."""
        return self.prompt + completion

    def job(self, program: str, *, limits: Limits | None = None) -> AssertionJob:
        """Returns the job that the sandbox judges; limits None leaves them to the sandbox."""
        return AssertionJob(
            program=with_header(self.header, program),
            tests=self.tests + self.challenge_tests + self.plus_tests,
            setup=self.setup,
            preamble=self.preamble,
            entry_point=self.entry_point,
            limits=limits,
            inside=self.inside,
            apart=self.apart,
        )

    def passes_base(self, outcome: Outcome) -> bool | None:
        """Returns whether a program passed all tests but the plus tests; None where the task has no plus tests."""
        base = len(self.tests + self.challenge_tests)
        return outcome.tests[:base] == ("passed",) * base if self.plus_tests else None


def mbpp_tasks(
    source: str = "google-research-datasets/mbpp",
    split: str = "test",
    *,
    subset: str | None = None,
    challenge_tests: bool = False,
    ids: Sequence[int | str] | None = None,
    exclude: Sequence[int | str] | None = None,
    limit: int | None = None,
) -> tuple[AssertionTask, ...]:
    """MBPP (Austin et al. 2021, arXiv 2108.07732) in either schema, or EvalPlus's MBPP+ (Liu et al. 2023, 2305.01210).

    Args:
        source: a JSON or JSONL file (.gz too), a folder with `{split}.json`, or the hub name; ``evalplus/mbppplus``,
            or a file with its columns, for MBPP+, whose `test` is judged after test_list.
        split: ``train``, ``validation``, ``test`` or ``prompt``: the tasks of the published id ranges, also out of one
            file that holds them all; ``all`` takes every row of a file, and every file of a folder.
        subset: the hub's ``full`` or ``sanitized``.
        challenge_tests: judge by challenge_test_list too.
        ids: only these tasks, in this order; 11, "11" and "Mbpp/11" are the same.
        exclude: without these tasks.
        limit: only the first so many.

    Raises:
        FileNotFoundError, ValueError: source unreadable, or a bad row; the message names file and row.
    """
    if split not in (*SPLIT_IDS, "all"):
        raise UserError(f"split must be one of {', '.join(SPLIT_IDS)}, all, got {split!r}")
    rows = _rows(source, split, subset)
    if split != "all":
        rows = ((where, row) for where, row in rows if take(row, where, "task_id", int) in SPLIT_IDS[split])
    make = partial(_from_mbpp, challenge_tests=challenge_tests)
    return select_tasks(rows, _mbpp_id, make, f"{source} (split {split})", ids, exclude, limit)


def humaneval_tasks(
    source: str = "openai/openai_humaneval",
    split: str = "test",
    *,
    ids: Sequence[int | str] | None = None,
    exclude: Sequence[int | str] | None = None,
    limit: int | None = None,
) -> tuple[AssertionTask, ...]:
    """HumanEval (Chen et al. 2021, arXiv 2107.03374), or a file with its fields.

    Args:
        source: a JSON or JSONL file (.gz too), a folder with `{split}.json`, or the hub name.
        split: which file of a folder, or which split of a hub dataset.
        ids, exclude, limit: as in :func:`mbpp_tasks`.

    Raises:
        FileNotFoundError, ValueError: source unreadable, or a bad row; the message names file and row.
    """
    return select_tasks(_rows(source, split), _humaneval_id, _from_humaneval, source, ids, exclude, limit)


def packaged_function_tasks(
    *,
    challenge_tests: bool = True,
    ids: Sequence[int | str] | None = None,
    exclude: Sequence[int | str] | None = None,
    limit: int | None = None,
) -> tuple[AssertionTask, ...]:
    """The 36 functions of :func:`wmtp.data.packaged_functions`, with ids "packaged/1" to "packaged/36".

    Args:
        challenge_tests: judge by the further tests too.
        ids, exclude, limit: as in :func:`mbpp_tasks`.
    """
    rows = (
        (f"packaged task {row['task_id']}", row | {"task_id": f"packaged/{row['task_id']}"})
        for row in packaged_functions()
    )
    make = partial(_from_mbpp, challenge_tests=challenge_tests)
    return select_tasks(rows, _mbpp_id, make, "packaged functions", ids, exclude, limit)


def assertion_tasks(
    source: str,
    split: str | None = None,
    *,
    subset: str | None = None,
    challenge_tests: bool = False,
    ids: Sequence[int | str] | None = None,
    exclude: Sequence[int | str] | None = None,
    limit: int | None = None,
) -> tuple[AssertionTask, ...]:
    """Tasks of any file with the fields of MBPP or of HumanEval, row by row.

    Args:
        source, subset, challenge_tests, ids, exclude, limit: as in :func:`mbpp_tasks`; a row's task_id may be a string.
        split: which file of a folder, or which split of a hub dataset.

    A row is taken for MBPP's where it has `test_list`, else for HumanEval's where it has `test` and `entry_point`
    (LeetCodeDataset's too: `completion` serves as canonical_solution, and `query` as text). Its tests may also be test
    cases of `unittest`, or functions `test...`, see :func:`wmtp.eval.trusted_code.with_calls`.

    Raises:
        FileNotFoundError, ValueError: source unreadable, or a bad row; the message names file and row.
    """

    def id_of(row: dict, where: str) -> str:
        return (_mbpp_id if _is_mbpp(row, where) else _humaneval_id)(row, where)

    def make(row: dict, where: str) -> AssertionTask:
        return _from_mbpp(row, where, challenge_tests) if _is_mbpp(row, where) else _from_humaneval(row, where)

    return select_tasks(_rows(source, split, subset), id_of, make, source, ids, exclude, limit)


def _rows(source: str, split: str | None, subset: str | None = None) -> ReadColumns:
    judging = {"challenge_test_list": list[str], "test_setup_code": str, "test_imports": list[str]}
    # HumanEvalPack has an empty `test_setup`; one that holds something is refused with the row.
    return ReadColumns(read_rows(source, split, subset), judging, ("test_setup",))


def _is_mbpp(row: dict, where: str) -> bool:
    """Returns whether a row has MBPP's shape; else it has HumanEval's."""
    if row.get("test_list") is None and (row.get("test") is None or row.get("entry_point") is None):
        raise UserError(
            f"{where}: neither MBPP's fields (task_id, text or prompt, code, test_list) nor HumanEval's (task_id, "
            f"prompt, canonical_solution, test, entry_point); the row has {fields_of(row)}"
        )
    return row.get("test_list") is not None


def _from_mbpp(row: dict, where: str, challenge_tests: bool) -> AssertionTask:
    refuse_unread_tests(row, where, _MBPP_COLUMNS, "test_list, or code that runs in test")
    fields = mbpp_task(row | {"task_id": 0}, where)  # its own check of task_id takes whole numbers only
    shown, further = (
        tuple(with_calls(test, f"{where}: test {test!r:.60}") for test in given)
        for given in (fields["test_list"], take_texts(row, where, "challenge_test_list"))
    )
    hidden = further if challenge_tests else ()
    plus = (_same_shape(take(row, where, "test", str)),) if row.get("test") else ()
    tests = [parsed(test, f"{where}: test {test!r:.60}") for test in shown + hidden]
    setup = lf(take(row, where, "test_setup_code", str)) if row.get("test_setup_code") is not None else ""
    solution = parsed(fields["code"], f"{where}: field 'code'")
    imports = take_texts(row, where, "test_imports")
    if plus:
        tests.append(parsed(plus[0], f"{where}: field 'test'"))
        if not bound_names(solution) & {node.id for node in ast.walk(tests[-1]) if isinstance(node, ast.Name)}:
            raise UserError(
                f"{where}: field 'test' uses nothing that field 'code' defines ({plus[0]!r:.60}), so it tests nothing; "
                "mend or remove it, or leave the task out with exclude"
            )
    return AssertionTask(
        task_id=_mbpp_id(row, where),
        text=fields["text"],
        prompt="",
        entry_point=called(tests, defined_names(solution)),
        solution=fields["code"],
        setup=setup,
        preamble="\n".join([*imports, *imports_of_tests(tests, solution, setup, imports, where)]),
        tests=shown,
        challenge_tests=hidden,
        plus_tests=plus,
        unused_tests=0 if challenge_tests else len(further),
    )


def _same_shape(test: str) -> str:
    """Makes MBPP+'s test ask for the expected shape too: to `allclose`, an empty list is close to every number."""
    return test.replace(_CLOSE, f"np.shape(out) == np.shape(exp) and {_CLOSE}")


def _from_humaneval(row: dict, where: str) -> AssertionTask:
    known = _LEETCODE_COLUMNS if row.get("query") is not None else _HUMANEVAL_COLUMNS
    refuse_unread_tests(row, where, known, "test, as assertions of check(candidate)")
    test, entry_point = take(row, where, "test", str), take(row, where, "entry_point", str)
    if "check" in defined_names(parsed(test, f"{where}: field 'test'")):
        judged = f"{test}\ncheck(candidate)"
    elif (judged := with_calls(test, f"{where}: field 'test'")) == test:
        raise UserError(
            f"{where}: field 'test' must define check(candidate), a unittest.TestCase or functions test..., got "
            f"{test!r:.60}"
        )
    parsed(entry_point, f"{where}: field 'entry_point'", mode="eval")
    prompt = take(row, where, "prompt", str)
    solution = "completion" if row.get("canonical_solution") is None and "completion" in row else "canonical_solution"
    text = next((name for name in ("text", "query") if row.get(name) is not None), None)
    return AssertionTask(
        task_id=_humaneval_id(row, where),
        text="" if text is None else take(row, where, text, str),
        prompt=prompt,
        entry_point=entry_point,
        solution=take(row, where, solution, str),
        setup="",
        preamble=_whole(prompt, where),
        tests=(judged,),
    )


def _whole(prompt: str, where: str) -> str:
    """Returns a prompt as a program of its own: a function's head without a docstring at its end gets a body."""
    for body in ("", "\n    pass\n", "\n        pass\n", "\n\tpass\n"):
        with suppress(UserError):
            parsed(prompt + body, "prompt")
            return prompt + body
    parsed(prompt, f"{where}: field 'prompt'")  # which raises
    return prompt


def _task_id(row: dict, where: str, family: str) -> str:
    if isinstance(row.get("task_id"), str) and row["task_id"].strip():
        return row["task_id"]
    return f"{family}/{take(row, where, 'task_id', int)}"


_mbpp_id, _humaneval_id = partial(_task_id, family="Mbpp"), partial(_task_id, family="HumanEval")
