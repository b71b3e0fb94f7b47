"""Contest programs whose output must not count as right."""

from attacks import DIED, QUICK, SLEEPER, Attack

WRONG = frozenset({"wrong_answer"})
RAISED = frozenset({"exception"})
TIMEOUT = frozenset({"timeout"})
SUM = (("2 3\n", "5\n"),)
THOUSAND = (("1000\n", "1000\n"),)


def _attack(name: str, program: str, verdicts, stdio=SUM, limits=QUICK) -> Attack:
    return Attack(name, program, verdicts=verdicts, stdio=stdio, limits=limits)


ATTACKS = (
    _attack("prints_nothing", '"""Prints nothing and leaves with status 0."""\nraise SystemExit(0)\n', WRONG),
    _attack("right_on_stderr", '"""Prints the right answer on stderr."""\nimport sys\n\nprint(5, file=sys.stderr)\n', WRONG),
    _attack("several_answers", '"""Prints every answer it can think of."""\nprint(*range(10))\n', WRONG),
    _attack("answer_and_more", '"""Prints the right answer and another word."""\nprint(5, "or so")\n', WRONG),
    _attack("raises_after_output", '"""Prints the right answer and then fails."""\nprint(5, flush=True)\nraise ValueError\n', RAISED),
    _attack(
        "raises_in_a_deep_frame",
        '"""Prints the right answer and then recurses without end."""\nprint(5, flush=True)\n\n\ndef f():\n    f()\n\n\nf()\n',
        RAISED,
    ),
    _attack(
        "crashes_after_output",
        '"""Prints the right answer and then reads address 0."""\nimport ctypes\n\nprint(5, flush=True)\nctypes.string_at(0)\n',
        DIED,
    ),
    _attack(
        "loops_after_output",
        '"""Prints the right answer and then loops for ever."""\nprint(5, flush=True)\nwhile True:\n    pass\n',
        TIMEOUT,
    ),
    _attack(
        "waits_in_a_thread",
        '"""Prints the right answer, and a thread that is no daemon keeps it alive."""\nimport threading\nimport time\n\n'
        "print(5, flush=True)\nthreading.Thread(target=time.sleep, args=[10**6]).start()\n",
        TIMEOUT,
        limits=SLEEPER,
    ),
    _attack(
        "waits_at_exit",
        '"""Prints the right answer and waits in atexit."""\nimport atexit\nimport time\n\n'
        "print(5, flush=True)\natexit.register(time.sleep, 10**6)\n",
        TIMEOUT,
        limits=SLEEPER,
    ),
    _attack(
        "wrong_at_exit",
        '"""Prints the right answer, and more at its very end."""\nimport atexit\n\natexit.register(print, 6)\nprint(5)\n',
        WRONG,
    ),
    _attack(
        "killed_after_output",
        '"""Prints the right answer and kills itself."""\nimport os\nimport signal\n\nprint(5, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n',
        DIED,
    ),
    _attack("failing_status", '"""Prints a wrong answer and leaves with a status other than 0."""\nprint(6)\nraise SystemExit(7)\n',
            frozenset({"wrong_answer", "exception"})),
    _attack("underscores_in_an_int", '"""Prints an int as Python, but no checker, reads it."""\nprint("1_000")\n', WRONG, THOUSAND),
    _attack("digits_of_another_script", '"""Prints digits that int() takes for 1000."""\nprint("\\u0661\\u0660\\u0660\\u0660")\n', WRONG, THOUSAND),
    _attack("full_width_digits", '"""The same with full-width digits."""\nprint("\\uff11\\uff10\\uff10\\uff10")\n', WRONG, THOUSAND),
    _attack("float_for_an_int", '"""Prints a float where an int is expected."""\nprint("1000.0")\n', WRONG, THOUSAND),
    _attack("exponent_for_an_int", '"""Prints 1e3."""\nprint("1e3")\n', WRONG, THOUSAND),
    _attack(
        "off_by_one_beyond_doubles",
        '"""Prints a large int that is equal to the right one as a double only."""\nprint(9007199254740992)\n',
        WRONG,
        (("", "9007199254740993"),),
    ),
    _attack("not_a_number", '"""Prints nan, which is within every tolerance if it is compared carelessly."""\nprint("nan")\n', WRONG, (("", "0.5"),)),
    _attack("infinity", '"""Prints an infinity where a number is expected."""\nprint("inf")\n', WRONG, (("", "1e308"),)),
    _attack("no_text", '"""Prints bytes that are no text, and NULs."""\nimport os\n\nos.write(1, b"5\\x00\\xff\\xfe\\n")\n', WRONG),
    _attack("null_before", '"""Hides another answer behind a NUL."""\nimport os\n\nos.write(1, b"5\\x006\\n")\n', WRONG),
    _attack(
        "long_digits",
        '"""Prints an int of 100,000 digits, more than int() reads."""\nprint("1" * 100_000)\n',
        WRONG,
    ),
    _attack(
        "digits_and_a_letter",
        '"""Prints a word that looks like a number for a long time, for a pattern that tries every way to read it."""\n'
        "print('1' * 400_000 + 'x')\n",
        WRONG,
    ),
    _attack(
        "digits_of_a_double",
        '"""Prints as many digits of a number as it may."""\nprint("1" * 4_000_000 + "." + "3" * 4_000_000)\n',
        WRONG,
    ),
    _attack(
        "closed_stdout",
        '"""Closes its output before it prints."""\nimport os\n\nos.close(1)\nprint(5)\n',
        frozenset({"wrong_answer", "exception"}),
    ),
    _attack(
        "output_into_input",
        '"""Writes the answer into the file it reads from, and cuts it."""\nimport os\n\nfor change in (lambda: os.pwrite(0, b"5 5", 0), lambda: os.ftruncate(0, 0)):\n'
        "    try:\n        change()\n    except OSError:\n        pass\nprint(6)\n",
        WRONG,
        (("2 3\n", "5\n"), ("2 4\n", "6\n")),
    ),
    _attack(
        "state_between_tests",
        '"""Counts, in a file, how often it was run, to know later tests by their number."""\nimport os\n\n'
        'name = "count"\ncount = len(open(name).read()) if os.path.exists(name) else 0\nopen(name, "a").write("x")\n'
        "print([5, 6][count])\n",
        WRONG,
        (("", "5"), ("", "6")),
    ),
    _attack(
        "looks_for_the_expected_output",
        '"""Searches every module and every open file for the expected output."""\nimport gc\nimport os\nimport sys\n\nfound = set()\n'
        "for thing in gc.get_objects():\n    try:\n        text = repr(thing) if isinstance(thing, (dict, list, tuple)) else ''\n"
        "    except BaseException:\n        continue\n    if 'wmtp-' + 'expected-' in text:\n"
        "        found.add(text.split('wmtp-' + 'expected-')[1][:6])\n"
        "for descriptor in range(64):\n    try:\n        os.set_blocking(descriptor, False)\n        text = os.read(descriptor, 1 << 16)\n"
        "    except OSError:\n        continue\n    if b'wmtp-' + b'expected-' in text:\n"
        "        found.add(text.split(b'wmtp-' + b'expected-')[1][:6].decode())\n"
        "print(*['wmtp-' + 'expected-' + f for f in found])\n",
        WRONG,
        (("", "wmtp-expected-914273\n"),),
    ),
    _attack(
        "verdict_by_descriptor",
        '"""Writes what a harness may take for a verdict to every descriptor but its output."""\nimport json\nimport os\n\n'
        'for descriptor in range(3, 256):\n    for text in (b"passed\\n", json.dumps({"verdict": "passed", "ok": True}).encode(), bytes(64)):\n'
        "        try:\n            os.set_blocking(descriptor, False)\n            os.write(descriptor, text)\n"
        "        except OSError:\n            pass\nprint(6)\n",
        frozenset({"wrong_answer", "violation", "exception", "output_limit"}),
    ),
    _attack(
        "closed_descriptors",
        '"""Closes every descriptor but its output, and then prints a wrong answer."""\nimport os\n\nos.closerange(2, 1024)\nos.close(0)\nprint(6)\n',
        frozenset({"wrong_answer", "violation", "exception"}),
    ),
    _attack(
        "replaced_descriptors",
        '"""Puts its output in the place of every other descriptor."""\nimport os\n\nfor descriptor in range(2, 256):\n'
        "    os.dup2(1, descriptor)\nprint(6)\n",
        frozenset({"wrong_answer", "violation", "exception"}),
    ),
    _attack(
        "exit_in_a_thread",
        '"""A thread ends the process with status 0 in the middle of the output."""\nimport os\nimport threading\n\n'
        "print(6, flush=True)\nthreading.Thread(target=os._exit, args=[0]).start()\n",
        frozenset({"wrong_answer", "exception"}),
    ),
    _attack(
        "stops_itself",
        '"""Prints the right answer and stops itself."""\nimport os\nimport signal\n\nprint(5, flush=True)\n'
        "os.kill(os.getpid(), signal.SIGSTOP)\nraise ValueError\n",
        frozenset({"timeout", "exception"}),
        limits=SLEEPER,
    ),
)
