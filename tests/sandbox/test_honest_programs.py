"""Unusual but right programs pass, and are right in a plain interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
from honest import PROGRAMS

from wmtp.sandbox import Sandbox

by_name = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)

PLAIN = """
import sys
program, setup, preamble, tests, entry_point = sys.stdin.read().split("\\x1e")
module = type(sys)("program")
sys.modules["program"] = module
names = module.__dict__
exec(compile(program.removeprefix("\\ufeff"), "program.py", "exec"), names)
exec(setup, names)
if entry_point:
    names["candidate"] = eval(entry_point, names)
exec(preamble, names) if not entry_point else None
sys.set_int_max_str_digits(0)
exec(tests, names)
"""


def skip_what_is_absent(program):
    if program.needs and importlib.util.find_spec(program.needs) is None:
        pytest.skip(f"{program.needs} is not installed")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2) as sandbox:
        yield sandbox


@by_name
def test_honest_program_passes(program, sandbox):
    skip_what_is_absent(program)
    outcome = sandbox.submit(program.job()).result(timeout=300)
    assert outcome.verdict == "passed", outcome
    if program.stdio:
        assert outcome.tests == ("passed",) * len(program.stdio)
        assert outcome.lenient_tests == (True,) * len(program.stdio)


@by_name
def test_honest_program_is_right_in_a_plain_interpreter(program, tmp_path):
    skip_what_is_absent(program)
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:surrogateescape", "OPENBLAS_NUM_THREADS": "1"}

    def run(arguments, text):
        for old in tmp_path.iterdir():
            old.unlink() if old.is_file() else None
        data = text.encode("utf-8", "surrogatepass")
        done = subprocess.run(
            [sys.executable, *arguments], input=data, capture_output=True, cwd=tmp_path, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    if not program.stdio:
        run(
            ["-c", PLAIN],
            "\x1e".join(
                [program.text, program.setup, program.preamble, "\n".join(program.tests), program.entry_point or ""]
            ),
        )
        return
    source = tmp_path.parent / f"{program.name}.py"
    source.write_bytes(program.text.encode())
    for text, expected in program.stdio:
        with open(tmp_path.parent / f"{program.name}.in", "w+b") as stdin:
            stdin.write(text.encode())
            stdin.seek(0)
            for old in tmp_path.iterdir():
                old.unlink()
            done = subprocess.run(
                [sys.executable, source], stdin=stdin, capture_output=True, cwd=tmp_path, env=environment, timeout=300
            )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.split() == expected.encode().split()
