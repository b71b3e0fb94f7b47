"""Tiny tasks with tests, in words and as programs of a few statements, and faults planted in them: made, not collected.

A task names three to five numbers, each made of those before it, and asks for the last one. Its program has a statement
for each. Statements have usual forms and rare ones, so that what is unusual is not what is wrong. The tests are the
answers of the task's own program.
"""

import random
from dataclasses import dataclass

RARE = 0.04  # share of the statements that base programs write in a rare form
NAMES = "xabcde"  # of the argument and of each statement's variable: one token each

Step = tuple[str, tuple]  # the kind, its variables and constants


@dataclass(frozen=True)
class TinyTask:
    """A task in the shape of MBPP, its steps, and its program."""

    task_id: int
    text: str
    code: str
    tests: tuple[str, ...]
    steps: tuple[Step, ...]

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
    "add": "{u} plus {c}",
    "sub": "{u} minus {c}",
    "mul": "{u} times {c}",
    "mod": "{u} modulo {c}",
    "max": "{u} but at least {c}",
    "min": "{u} but at most {c}",
    "plus": "{u} plus {w}",
    "minus": "{u} minus {w}",
}
CODE = {  # the usual forms, then the rare ones
    "add": (("{u} + {c}",), ("{c} + {u}", "{u} - -{c}")),
    "sub": (("{u} - {c}",), ("-{c} + {u}", "{u} + -{c}")),
    "mul": (("{u} * {c}",), ("{c} * {u}", "{u} * {c} + 0")),
    "mod": (("{u} % {c}",), ("({u} + {c}) % {c}", "{u} - {u} // {c} * {c}")),
    "max": (("max({u}, {c})",), ("max({c}, {u})", "-min(-{u}, -{c})")),
    "min": (("min({u}, {c})",), ("min({c}, {u})", "-max(-{u}, -{c})")),
    "plus": (("{u} + {w}",), ("{w} + {u}", "{u} - -{w}")),
    "minus": (("{u} - {w}",), ("-{w} + {u}", "{u} + -{w}")),
}


def tiny_tasks(count: int, seed: int, first_id: int = 0, rare: float = RARE) -> list[TinyTask]:
    """Returns tasks, no two with the same text; what is drawn depends on the seed alone."""
    draw, tasks, seen = random.Random(seed), [], set()
    while len(tasks) < count:
        steps = tuple(_step(draw, number) for number in range(1, draw.randint(3, 5) + 1))
        words = [f"{dict(values)['v']} is {WORDS[kind].format(**dict(values))}" for kind, values in steps]
        text = f"f of x: {'; '.join(words)}."
        if text in seen:
            continue
        seen.add(text)
        code = program([_statement(step, draw, draw.random() < rare) for step in steps])
        inputs = [draw.randint(-9, 30) for _ in range(8)]
        tests = tuple(f"assert f({x}) == {value}" for x, value in zip(inputs, answers(code, inputs), strict=True))
        tasks.append(TinyTask(first_id + len(tasks), text, code, tests, steps))
    return tasks


def planted(task: TinyTask, seed: int) -> dict | None:
    """Returns a pair that `wmtp.critic.pairs.jsonl_pairs` reads: a right program and one with a single wrong statement.

    Both have one other statement in a rare form that is right. None where no change of the chosen statement is found
    that a test notices.
    """
    draw = random.Random(f"{seed} {task.task_id}")
    fault, odd = draw.sample(range(len(task.steps)), 2)
    statements = [_statement(step, draw, number == odd) for number, step in enumerate(task.steps)]
    right = program(statements)
    inputs = [int(test[len("assert f(") : test.index(")")]) for test in task.tests]
    for _ in range(20):
        wrong = list(statements)
        wrong[fault] = _statement(_mutated(task.steps[fault], draw), draw, False)
        faulty = program(wrong)
        if answers(faulty, inputs) != answers(right, inputs):  # lines are numbered from 1, and the first is the def
            pair = {"problem": str(task.task_id), "correct": right, "incorrect": faulty}
            return pair | {"fault_line": 2 + fault, "odd_line": 2 + odd}
    return None


def written(task: TinyTask, mistakes: float, seed: int) -> str:
    """Returns the task's program as someone writes it who gets a share of the statements wrong, rare forms included."""
    draw = random.Random(f"{seed} {task.task_id}")
    steps = [_mutated(step, draw) if draw.random() < mistakes else step for step in task.steps]
    return program([_statement(step, draw, draw.random() < RARE) for step in steps])


def program(statements: list[str]) -> str:
    """Returns the function whose last statement's variable is the answer."""
    last = statements[-1].partition(" ")[0]
    return "\n".join(["def f(x):", *(f"    {statement}" for statement in statements), f"    return {last}"])


def answers(code: str, inputs: list[int]) -> list[int]:
    """Returns what a program of this file answers, not of a model: it is run here."""
    names: dict = {}
    exec(code, names)
    return [names["f"](x) for x in inputs]


def _step(draw: random.Random, number: int) -> Step:
    """Returns step `number`, from 1, which reads the variable before it and maybe another one."""
    kinds = list(WORDS) if number > 1 else [kind for kind in WORDS if kind not in ("plus", "minus")]
    other = NAMES[draw.randrange(max(number - 1, 1))]
    values = {"v": NAMES[number], "u": NAMES[number - 1], "w": other, "c": draw.randint(2, 9)}
    return draw.choice(kinds), tuple(values.items())


def _statement(step: Step, draw: random.Random, rare: bool) -> str:
    kind, values = step
    return ("{v} = " + draw.choice(CODE[kind][rare])).format(**dict(values))


def _mutated(step: Step, draw: random.Random) -> Step:
    """Returns a step with another constant, other variables or another operation."""
    kind, values = step[0], dict(step[1])
    if kind in ("plus", "minus") and draw.random() < 0.5:
        values["u"], values["w"] = values["w"], values["u"]
        return kind, tuple(values.items())
    if kind not in ("plus", "minus") and draw.random() < 0.5:
        values["c"] = draw.choice([c for c in range(2, 10) if c != values["c"]])
        return kind, tuple(values.items())
    other = {"add": "sub", "sub": "add", "mul": "add", "mod": "mul", "max": "min", "min": "max"}
    return (other | {"plus": "minus", "minus": "plus"})[kind], step[1]
