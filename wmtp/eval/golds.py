"""Whether the tests of tasks can be relied on, found before anything is judged by them: each task's own solution must
pass them, and a program that answers nothing must not.
"""

import ast
from collections.abc import Callable, Sequence
from dataclasses import replace

from wmtp.distributed import on_rank_0
from wmtp.errors import UserError
from wmtp.eval.assertion_tasks import AssertionTask
from wmtp.eval.protocols import Task
from wmtp.eval.trusted_code import bound_names, parsed
from wmtp.sandbox import Limits, Outcome, Sandbox

_NAMED = 5  # tasks that a line gives the reason of
_LISTED = 200  # tasks that a line names
_DETAIL = 120  # characters of a reason
_WALL_FACTOR = 5.0  # seconds by the clock for one of CPU time: a loaded machine must not end right programs


def settle_tests(
    tasks: Sequence[Task],
    sandbox: Sandbox,
    *,
    tests: str = "protected",
    limits: Limits | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Task, ...]:
    """Returns the tasks as they are to be judged: tests that the protected judge cannot run are marked `inside`.

    Each task's own solution is judged, by rank 0 for all ranks, and its CPU time kept as `gold_seconds`. A test without
    an `assert` or `raise` that would run is also tried on functions that return a fresh object, which it must not pass.

    Args:
        tasks: those without assertions, and those without a solution, stay as they are. Where one says `inside`
            already, the protected judge is not tried.
        tests: "protected" refuses tasks whose solution passes only with the tests inside the program's process;
            "inside" lets them be judged so.
        limits: of a program; None leaves them to the sandbox.
        log: is told, a line each, what was decided and which tests are not used.

    Raises:
        UserError: one line that names the tasks which cannot be judged, and why: their own solution fails, or a test
            asserts nothing, or `tests` is "protected" and they need "inside".
    """
    asserting = [task for task in tasks if isinstance(task, AssertionTask)]
    solved = [task for task in asserting if task.solution]
    settled = on_rank_0(lambda: _settled(solved, sandbox, tests, limits))
    if inside := [task_id for task_id, outcome in settled.items() if outcome.judged == "inside"]:
        log(
            f"{len(inside)} of {len(tasks)} tasks are judged inside: their tests run in the program's process, where a "
            f"program can fool them: {_listed(inside)}"
        )
    if untried := len(asserting) - len(solved):
        log(f"{untried} of {len(tasks)} tasks have no solution: nothing shows whether their tests can be passed")
    if unused := [task.unused_tests for task in asserting if task.unused_tests]:
        counts = f"{sum(unused)} challenge tests of {len(unused)} tasks"
        log(f"{counts} are not run; tasks.challenge_tests=true runs them too")
    return tuple(
        replace(task, inside=found.judged == "inside", gold_seconds=round(found.cpu_seconds, 3))
        if isinstance(task, AssertionTask) and (found := settled.get(task.task_id))
        else task
        for task in tasks
    )


def time_limit(task: Task, limits: Limits, *, factor: float, minimum: float) -> Limits:
    """Returns limits whose CPU time is `factor` times that of the task's solution, at least `minimum` seconds.

    EvalPlus' rule (Liu et al. 2023), where it holds for each input alone; here for all tests of a program together.

    Raises:
        UserError: the task has no solution that was judged.
    """
    if not isinstance(task, AssertionTask) or task.gold_seconds is None:
        raise UserError(
            f"gt_time_limit_factor is {factor}, but task {task.task_id} has no solution whose time it could multiply; "
            "set it to null, so that limits.cpu_seconds holds for all"
        )
    seconds = max(minimum, factor * task.gold_seconds)
    return replace(limits, cpu_seconds=seconds, wall_seconds=max(limits.wall_seconds, _WALL_FACTOR * seconds))


def _settled(tasks: Sequence[AssertionTask], sandbox: Sandbox, tests: str, limits: Limits | None) -> dict[str, Outcome]:
    """Outcomes of the solutions, by task id, in the mode that they pass in; raises where a task cannot be judged."""
    outcomes = _judge_golds([task for task in tasks if not task.inside], sandbox, limits)
    protected = {task_id: outcome for task_id, outcome in outcomes.items() if outcome.verdict != "passed"}
    failing = [task for task in tasks if task.inside or task.task_id in protected]
    outcomes |= _judge_golds([replace(task, inside=True) for task in failing], sandbox, limits)
    in_no_mode = {task_id: outcome for task_id, outcome in outcomes.items() if outcome.verdict != "passed"}
    inside = [task for task in failing if task.task_id not in in_no_mode]
    empty = _find_empty(tasks, inside, sandbox, limits)
    bad = {}
    for task_id, outcome in in_no_mode.items():
        reasons = dict.fromkeys(map(_reason, [outcome, protected.get(task_id, outcome)]))
        bad[task_id] = f"its own solution fails: {'; protected: '.join(reasons)}"
    for task_id, test in empty.items():
        bad[task_id] = f"test {test!r:.60} asserts nothing, so every program would pass it"
    only_inside = [task.task_id for task in inside if task.task_id not in bad] if tests == "protected" else []
    for task_id in only_inside:
        why = _reason(protected[task_id]) if task_id in protected else "its tests patch what the program calls"
        bad[task_id] = f"protected tests cannot express it: {why}"
    if bad:
        few = "; ".join(f"{task_id}: {reason}" for task_id, reason in list(bad.items())[:_NAMED])
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        way = _way_out([task_id for task_id in bad if task_id not in only_inside], only_inside)
        raise UserError(f"{len(bad)} of {len(tasks)} tasks cannot be judged ({few}{more}); {way}")
    return {task.task_id: outcomes[task.task_id] for task in tasks}


def _judge_golds(tasks: Sequence[AssertionTask], sandbox: Sandbox, limits: Limits | None) -> dict[str, Outcome]:
    outcomes = sandbox.judge(task.job(task.program(task.solution), limits=limits) for task in tasks)
    return {task.task_id: outcome for task, outcome in zip(tasks, outcomes, strict=True)}


def _find_empty(
    tasks: Sequence[AssertionTask], inside: Sequence[AssertionTask], sandbox: Sandbox, limits: Limits | None
) -> dict[str, str]:
    """Finds, by task id, the first test that also passes when every function returns nothing of use."""
    doubtful = [
        (task, test) for task in tasks for test in task.job("").tests if task in inside or not asserts_literally(test)
    ]
    # Inside, also a test passes that never uses the program: that is what is to be found.
    jobs = (replace(task.job(_stub(task), limits=limits), tests=(test,), inside=True) for task, test in doubtful)
    outcomes = sandbox.judge(jobs)
    found: dict[str, str] = {}
    for (task, test), outcome in zip(doubtful, outcomes, strict=True):
        if outcome.verdict == "passed":
            found.setdefault(task.task_id, test)
    return found


def asserts_literally(test: str) -> bool:
    """Returns whether a test, which must compile, has an `assert` or a `raise` of its own on its way.

    At its top level, in a class body, or in a function that is named from there, directly or through others.
    """
    tree = parsed(test, "test")
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Assert | ast.Raise):
            return True
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in functions:
            todo += functions.pop(node.id).body
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return False


def _stub(task: AssertionTask) -> str:
    """Returns a program with the names of the task's solution, in which every call returns a fresh object."""
    program = parsed(task.program(task.solution), f"the solution of task {task.task_id}")
    classes = {node.name for node in program.body if isinstance(node, ast.ClassDef)}
    parts = ["def _answer(*args, **kwargs): return object()"]
    for name in sorted(bound_names(program)):
        if name in classes:
            parts.append(f"class {name}:\n def __init__(self, *args, **kwargs): pass")
            parts.append(" def __getattr__(self, name): return _answer")
        else:
            parts.append(f"{name} = _answer")
    return "\n".join(parts) + "\n"


def _reason(outcome: Outcome) -> str:
    detail = f"{outcome.verdict}, {outcome.detail}"
    return detail if len(detail) <= _DETAIL else f"{detail[:_DETAIL]}..."


def _way_out(in_no_mode: list[str], only_inside: list[str]) -> str:
    if not only_inside:
        return f"mend them, or leave them out with {_exclude(in_no_mode)}"
    beside = f" and {_exclude(in_no_mode)}" if in_no_mode else ""
    return (
        f"set tests=inside{beside} to run the tests of {len(only_inside)} in the program's process, where a program "
        f"can fool them, or leave all out with {_exclude(in_no_mode + only_inside)}"
    )


def _exclude(task_ids: list[str]) -> str:
    return f"tasks.exclude=[{_listed(task_ids, ',')}]"


def _listed(task_ids: Sequence[str], comma: str = ", ") -> str:
    return comma.join([*task_ids[:_LISTED], *["..."] * (len(task_ids) > _LISTED)])
