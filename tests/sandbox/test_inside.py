"""Tests inside the program's process: what the protected judge cannot express passes; ending early never does."""

import textwrap

import pytest

from wmtp.sandbox import AssertionJob, Limits, Sandbox

SHORT = Limits(cpu_seconds=0.5, wall_seconds=1.5, output_bytes=1 << 20, memory_bytes=256 << 20)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2, limits=SHORT) as box:
        yield box


def judge(sandbox, program, *tests, inside=True, **fields):
    return sandbox.judge([AssertionJob(textwrap.dedent(program), tests, inside=inside, **fields)])[0]


# Names, local variables and a frame's own code are no values that another process could give back.
TEST = "assert f(3) == 3 and f.__code__.co_varnames == ('x',)"
RAISES = "import pytest\nwith pytest.raises(ValueError): f(3)"
IDENTITY = "def f(x): return x\n"

# Answers the request with a set of integers that all have one hash.
SLOW = """
import os, sys
def f(x):
    frame = sys._getframe()
    while "request" not in frame.f_locals:
        frame = frame.f_back
    items = ",".join('{"i":"%x"}' % (i * (2**61 - 1)) for i in range(1, 32_000))
    data = '{"nonce":"%s","value":{"set":[216,[%s]]}}' % (frame.f_locals["request"]["nonce"], items)
    data = len(data).to_bytes(4, "big") + data.encode()
    while data:
        data = data[os.write(3, data) :]
"""

VERDICTS = {
    "right": (IDENTITY, TEST, "passed"),
    "wrong": ("def f(x): return x + 1", TEST, "wrong_answer"),
    "raises": ("def f(x): return x[0]", TEST, "exception"),
    "no such name": ("def g(x): return x", TEST, "exception"),
    "syntax error": ("def f(x) return x", TEST, "exception"),
    "lone surrogate": ("x = '\ud800'", TEST, "exception"),
    "exits at the top": (IDENTITY + "import sys\nsys.exit(0)", TEST, "exception"),
    "SystemExit in a call": ("def f(x): raise SystemExit(0)", TEST, "exception"),
    "os._exit at the top": (IDENTITY + "import os\nos._exit(0)", TEST, "exception"),
    "os._exit in a call": ("import os\ndef f(x): os._exit(0)", TEST, "exception"),
    "os._exit in a thread": (
        "import os\nfrom threading import *\ndef f(x): Thread(target=os._exit, args=(0,)).start(); Event().wait()",
        TEST,
        "exception",
    ),
    "atexit": ("import atexit, os, sys\natexit.register(os._exit, 0)\ndef f(x): sys.exit()", TEST, "exception"),
    "quit": ("def f(x): raise KeyboardInterrupt", TEST, "exception"),
    "kills itself": ("import os\ndef f(x): os.kill(os.getpid(), 9)", TEST, "exception"),
    "starts a process": ("import os\ndef f(x): os.fork() or os._exit(0); return x", TEST, "exception"),
    "recursion": ("def f(x): return f(x)", TEST, "exception"),
    "memory": ("def f(x): return 'x' * (1 << 30)", TEST, "memory"),
    "floods stdout": ("def f(x):\n  while True: print('x' * 999)", TEST, "output_limit"),
    "spins": ("def f(x):\n  while True:\n    try:\n      while True: pass\n    except: pass", TEST, "timeout"),
    "sleeps": ("import time\ndef f(x): time.sleep(99)", TEST, "timeout"),
    "answers without the nonce": (
        "import os\ndef f(x):\n  os.write(3, b'\\0\\0\\0\\x10{\"error\": null  }')\n  return 4",
        TEST,
        "violation",
    ),
    "answers twice": (
        "import atexit, os\ndef f(x): os.write(3, b'\\0\\0\\0\\2{}'); return x",
        TEST,
        "violation",
    ),
    "sends a frame that is slow to read": (
        "import os\ndef f(x): os.write(3, (9000).to_bytes(4, 'big') + b'[' * 9000); return 4",
        TEST,
        "violation",
    ),
    "sends a value that is slow to rebuild": (SLOW, TEST, "timeout"),
    "closes the channel": ("import os\ndef f(x): os.close(3); return x", TEST, "exception"),
    "a test that does not compile": (IDENTITY, "assert f(3) ==", "harness_error"),
    "pytest.raises, as asked": ("def f(x): raise ValueError", RAISES, "passed"),
    "pytest.raises, nothing raised": (IDENTITY, RAISES, "wrong_answer"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict(sandbox, case):
    program, test, verdict = VERDICTS[case]
    outcome = judge(sandbox, program, test, limits=Limits() if "pytest" in test else None)  # it takes long to import
    assert (outcome.verdict, outcome.tests, outcome.judged) == (verdict, (verdict,), "inside"), outcome


def test_the_protected_judge_cannot_express_what_passes_inside(sandbox):
    outcome = judge(sandbox, IDENTITY, TEST, inside=False)
    assert outcome.verdict != "passed" and outcome.judged == "protected"


def test_names_are_those_of_other_harnesses(sandbox):
    """The prompt's unfinished function does not replace the program's; set-up and tests see the program's names."""
    outcome = judge(
        sandbox,
        "import math\ndef helper(x): return x\ndef f(x): return helper(x) + math.floor(0.5)",
        "assert candidate(2) == f(2) == helper(2) == two == 2",
        "assert math.pi > 3 and own == 5",
        preamble="own = 5\ndef helper(x): return None\ndef f(x):\n  '''Unfinished.'''\n",
        setup="two = f(2)",
        entry_point="f",
    )
    assert (outcome.verdict, outcome.tests) == ("passed", ("passed", "passed")), outcome
    method = {"program": "class S:\n  def f(self, x): return x", "entry_point": "S().f"}
    assert (
        judge(sandbox, method["program"], "assert candidate(1) == f(1) == 1", entry_point="S().f").verdict == "passed"
    )


def test_the_first_failure_ends_it_and_is_named(sandbox):
    program = "def f(x):\n  if x == 2: raise KeyError('two')\n  return x"
    outcome = judge(sandbox, program, "assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3")
    assert outcome.tests == ("passed", "exception") and outcome.detail == "test 1: KeyError: 'two'"


def test_what_fails_before_the_program_is_not_its_fault_and_what_fails_after_is(sandbox):
    broken = judge(sandbox, IDENTITY, TEST, preamble="import no_such_module")
    assert broken.verdict == "harness_error" and "no_such_module" in broken.detail
    assert judge(sandbox, IDENTITY, TEST, preamble="import os\nos._exit(0)").verdict == "harness_error"
    for text in ("raise MemoryError", "import no_such_module", "raise SystemExit", "def"):
        assert judge(sandbox, text, TEST).verdict != "harness_error"
        assert judge(sandbox, IDENTITY, TEST, setup=text).verdict != "harness_error"
