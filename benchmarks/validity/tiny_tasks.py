"""Tiny tasks with tests, in words and as programs of a few statements, and faults planted in them: made, not collected.

A task asks for a function of two whole numbers that takes three to five steps and returns an expression. Words and code
both have several forms, some of them rare, so that what is unusual is not what is wrong. The tests are the answers of
the task's own program.
"""

import random
from dataclasses import dataclass

RARE = 0.04  # share of the statements that base programs write in a rare form

Step = tuple[str, tuple]  # the kind, its variables and constants


@dataclass(frozen=True)
class TinyTask:
    """A task in the shape of MBPP, its steps, and its program."""

    task_id: int
    text: str
    code: str
    tests: tuple[str, ...]
    steps: tuple[Step, ...]
    result: str

    def row(self) -> dict:
        """Returns a row that `wmtp.eval.assertion_tasks` reads; the first test alone is shown."""
        shown, hidden = list(self.tests[:1]), list(self.tests[1:])
        return {
            "task_id": self.task_id,
            "text": self.text,
            "code": self.code,
            "test_list": shown,
            "challenge_test_list": hidden,
        }


WORDS = {
    "add": ("add {c} to {v}", "increase {v} by {c}"),
    "sub": ("subtract {c} from {v}", "decrease {v} by {c}"),
    "mul": ("multiply {v} by {c}", "make {v} {c} times as large"),
    "mod": ("take {v} modulo {c}", "keep the rest of {v} divided by {c}"),
    "max": ("make {v} at least {c}", "raise {v} to {c} if it is less"),
    "min": ("make {v} at most {c}", "lower {v} to {c} if it is more"),
    "plus": ("add {w} to {v}", "increase {v} by {w}"),
    "minus": ("subtract {w} from {v}", "decrease {v} by {w}"),
    "if": ("if {v} is above {c} subtract {d} from {w}", "where {v} exceeds {c} decrease {w} by {d}"),
}
CODE = {  # the usual forms, then the rare ones
    "add": (("{v} = {v} + {c}", "{v} += {c}"), ("{v} = {c} + {v}", "{v} -= -{c}")),
    "sub": (("{v} = {v} - {c}", "{v} -= {c}"), ("{v} = -{c} + {v}", "{v} += -{c}")),
    "mul": (("{v} = {v} * {c}", "{v} *= {c}"), ("{v} = {c} * {v}", "{v} = {v} * {c} + 0")),
    "mod": (("{v} = {v} % {c}", "{v} %= {c}"), ("{v} = {v} - {v} // {c} * {c}", "{v} = ({v} + {c}) % {c}")),
    "max": (("{v} = max({v}, {c})", "{v} = max({c}, {v})"), ("{v} = -min(-{v}, -{c})", "{v} = sorted([{v}, {c}])[1]")),
    "min": (("{v} = min({v}, {c})", "{v} = min({c}, {v})"), ("{v} = -max(-{v}, -{c})", "{v} = sorted([{v}, {c}])[0]")),
    "plus": (("{v} = {v} + {w}", "{v} += {w}"), ("{v} = {w} + {v}", "{v} -= -{w}")),
    "minus": (("{v} = {v} - {w}", "{v} -= {w}"), ("{v} = -{w} + {v}", "{v} += -{w}")),
    "if": (("if {v} > {c}:\n        {w} = {w} - {d}", "if {v} > {c}:\n        {w} -= {d}"),
           ("if {c} < {v}:\n        {w} = {w} - {d}", "if not {v} <= {c}:\n        {w} -= {d}")),
}  # fmt: skip
RESULTS = {"a": "a", "b": "b", "a plus b": "a + b", "a minus b": "a - b", "a times b": "a * b"}


def tiny_tasks(count: int, seed: int, first_id: int = 0, rare: float = RARE) -> list[TinyTask]:
    """Returns tasks, no two with the same text; what is drawn depends on the seed alone."""
    draw, tasks, seen = random.Random(seed), [], set()
    while len(tasks) < count:
        steps = tuple(_step(draw) for _ in range(draw.randint(3, 5)))
        result = draw.choice(list(RESULTS))
        words = [draw.choice(WORDS[kind]).format(**dict(values)) for kind, values in steps]
        text = f"Write f(a, b): {'; '.join(words)}; return {result}."
        if text in seen:
            continue
        seen.add(text)
        statements = [_statement(step, draw, draw.random() < rare) for step in steps]
        code = program(statements, RESULTS[result])
        inputs = [(draw.randint(-9, 30), draw.randint(-9, 30)) for _ in range(8)]
        tests = tuple(
            f"assert f({a}, {b}) == {value}" for (a, b), value in zip(inputs, answers(code, inputs), strict=True)
        )
        tasks.append(TinyTask(first_id + len(tasks), text, code, tests, steps, result))
    return tasks


def planted(task: TinyTask, seed: int) -> dict | None:
    """Returns a pair that `wmtp.critic.pairs.jsonl_pairs` reads: a right program and one with a single wrong statement.

    Both have one other statement in a rare form that is right. None where no change of the chosen statement is found
    that a test notices.
    """
    draw = random.Random(f"{seed} {task.task_id}")
    fault, odd = draw.sample(range(len(task.steps)), 2)
    statements = [_statement(step, draw, number == odd) for number, step in enumerate(task.steps)]
    right = program(statements, RESULTS[task.result])
    inputs = [eval(test[len("assert f") : test.index(" ==")]) for test in task.tests]
    for _ in range(20):
        wrong = list(statements)
        wrong[fault] = _statement(_mutated(task.steps[fault], draw), draw, False)
        faulty = program(wrong, RESULTS[task.result])
        if answers(faulty, inputs) != answers(right, inputs):
            before = sum(statement.count("\n") + 1 for statement in statements[:fault])
            changed = [x != y for x, y in zip(statements[fault].split("\n"), wrong[fault].split("\n"), strict=False)]
            if sum(changed) == 1 and len(faulty.split("\n")) == len(right.split("\n")):
                line = 2 + before + changed.index(True)  # after the def, from 1
                pair = {"problem": str(task.task_id), "correct": right, "incorrect": faulty, "fault_line": line}
                return pair | {"odd_line": 2 + sum(s.count("\n") + 1 for s in statements[:odd])}
    return None


def program(statements: list[str], result: str) -> str:
    return "\n".join(["def f(a, b):", *(f"    {statement}" for statement in statements), f"    return {result}"])


def answers(code: str, inputs: list[tuple[int, int]]) -> list[int]:
    """Returns what a program of this file answers, not of a model: it is run here."""
    names: dict = {}
    exec(code, names)
    return [names["f"](a, b) for a, b in inputs]


def _step(draw: random.Random) -> Step:
    v, w = draw.sample("ab", 2)
    return draw.choice(list(WORDS)), tuple({"v": v, "w": w, "c": draw.randint(2, 9), "d": draw.randint(2, 9)}.items())


def _statement(step: Step, draw: random.Random, rare: bool) -> str:
    kind, values = step
    return draw.choice(CODE[kind][rare]).format(**dict(values))


def _mutated(step: Step, draw: random.Random) -> Step:
    """Returns a step with another constant, another variable or another operation."""
    kind, values = step[0], dict(step[1])
    how = draw.choice(("constant", "variable", "operation"))
    if how == "constant":
        name = draw.choice("cd") if kind == "if" else "c"
        values[name] = draw.choice([c for c in range(2, 10) if c != values[name]])
    elif how == "variable":
        values["v"], values["w"] = values["w"], values["v"]
    else:
        other = {"add": "sub", "sub": "add", "mul": "add", "mod": "mul", "max": "min", "min": "max"}
        kind = (other | {"plus": "minus", "minus": "plus", "if": "if"})[kind]
    return kind, tuple(values.items())
