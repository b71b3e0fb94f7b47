"""No attack is taken for a right program, reads or leaves anything, or disturbs what is judged after it."""

import ast
import re
import subprocess
import sys
import time

import pytest
from attacks import ATTACKS, FAMILIES, files, forks, persistence, proc_and_secrets, signals, sockets
from attacks.channel import FORGED_RIGHTLY

from wmtp.sandbox import AssertionJob

CONFINED = (signals, forks, files, proc_and_secrets, sockets, persistence)  # what the kernel's layers are for

by_name = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)


@pytest.fixture(scope="module")
def at_rest(watch):
    """Processes and files around the idle pool; in a list, so that what one attack leaves fails no other's test."""
    return [rest(watch)]


@pytest.fixture(scope="module")
def weaker_at_rest(weaker_watch):
    return [rest(weaker_watch)]


def rest(watch):
    outcome = watch.sandbox.submit(watch.probe()).result()
    assert outcome.verdict == "passed", outcome
    return settled(watch, None)


def settled(watch, expected):
    """Number of processes and their settings, and files; waits a little for what is just ending."""
    deadline = time.monotonic() + 60
    while True:
        state = (sorted(watch.processes().values()), watch.files())
        if expected is None or state == expected or time.monotonic() > deadline:
            return state
        time.sleep(0.05)


@by_name
def test_attack_fails_and_leaves_nothing(attack, watch, at_rest):
    check(attack, watch, at_rest)


@pytest.mark.parametrize("attack", [a for f in CONFINED for a in f.ATTACKS], ids=lambda attack: attack.name)
def test_attack_fails_where_a_layer_is_missing(attack, weaker_watch, weaker_at_rest):
    """In a container there are often no namespaces, on an old kernel no Landlock: what is left must do."""
    if attack.name == "fill_the_disk" and any("scratch folder" in text for text in weaker_watch.sandbox.missing):
        pytest.skip("without a mount of its own the scratch folder has no bound, as the sandbox itself says")
    check(attack, weaker_watch, weaker_at_rest)


def check(attack, watch, at_rest):
    """Judge an attack and, at once behind it, an honest program that looks for what it changed."""
    attacked = watch.sandbox.submit(attack.job(watch.places))
    following = watch.sandbox.submit(watch.probe())
    outcome = attacked.result(timeout=300)
    assert outcome.verdict in attack.verdicts, outcome
    assert "\n" not in outcome.detail and len(outcome.detail) < 2000 and outcome.detail.isprintable()
    after = following.result(timeout=300)
    assert after.verdict == "passed", after
    (processes, files), at_rest[0] = at_rest[0], settled(watch, at_rest[0])
    assert at_rest[0][0] == processes
    assert at_rest[0][1] == files
    assert watch.visitors() == []


def test_many_attacks_at_once_leave_other_verdicts_alone(watch):
    """Honest programs between attacks, through several workers at a time, as in a batch of samples of one model."""
    from wmtp.sandbox import Sandbox

    chosen = [attack for attack in ATTACKS if "timeout" not in attack.verdicts and not attack.stdio][::4]
    jobs = [job for attack in chosen for job in (attack.job(watch.places), watch.probe())]
    with Sandbox(workers=2) as sandbox:
        outcomes = sandbox.judge(jobs)
    wrong = [(a.name, o) for a, o in zip(chosen, outcomes[::2], strict=True) if o.verdict not in a.verdicts]
    assert wrong == []
    assert [o for o in outcomes[1::2] if o.verdict != "passed"] == []


def test_forged_values_are_read_as_answers(watch):
    """Else the attacks that forge costly values would fail for another reason than theirs."""
    assert watch.sandbox.submit(FORGED_RIGHTLY.job(watch.places)).result().verdict == "passed"


NAIVE = """
import sys
program, preamble, setup, tests = sys.argv[1:]
names = {"__name__": "program"}
exec(compile(program, "program", "exec"), names)
exec(setup, names)
exec(preamble, names)
exec(tests, names)
"""


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a.fools_naive], ids=lambda attack: attack.name)
def test_attack_fools_a_naive_judge(attack):
    """The attacks are real: where code and tests share an interpreter and the exit code decides, they pass."""
    argument = [attack.program.lstrip("\n"), attack.preamble, attack.setup, "\n".join(attack.tests)]
    done = subprocess.run([sys.executable, "-I", "-c", NAIVE, *argument], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_program_says_what_it_tries():
    names = [attack.name for attack in ATTACKS]
    assert len(names) == len(set(names))
    for family in FAMILIES:
        assert family.__doc__, family
        for attack in family.ATTACKS:
            if family.__name__.endswith("sources"):  # texts that are no programs, or too big to parse here
                continue
            assert ast.get_docstring(ast.parse(re.sub("@[A-Z]+@", "0", attack.program))), attack.name


def test_an_attack_cannot_pass_by_the_harness_being_broken(watch):
    """The verdicts above mean something: the same tests pass with right programs in the same pool."""
    jobs = [
        AssertionJob("def solve(a, b):\n    return a + b\n", ("assert solve(2, 3) == 5",)),
        AssertionJob("def secret():\n    return 914273\n", ("assert secret() == 914273",)),
        AssertionJob("solve = sorted\n", ("assert solve([3, 1, 2]) == [1, 2, 3]",)),
    ]
    assert [outcome.verdict for outcome in watch.sandbox.judge(jobs)] == ["passed"] * 3
