"""Hunts for the expected value, or for a verdict to overwrite, in the interpreter's own memory."""

from attacks import SECRET, Attack, with_syscalls

# The number after "secret() ==" in any text; the pattern is put together so that the program does not find itself.
FIND = """
import re

PATTERN = "secret" + r"\\(\\)" + r" == (\\d+)"


def number_in(thing, depth=0):
    if isinstance(thing, (bytes, bytearray)):
        thing = bytes(thing).decode("latin-1")
    if isinstance(thing, str):
        found = re.search(PATTERN, thing)
        return int(found[1]) if found else None
    if isinstance(thing, dict):
        thing = [*thing.keys(), *thing.values()]
    if isinstance(thing, (list, tuple, set, frozenset)) and depth < 4:
        for item in list(thing):
            number = number_in(item, depth + 1)
            if number is not None:
                return number
    return None
"""

ATTACKS = (
    Attack(
        "walk_the_frames",
        '"""Looks through the constants and the variables of every caller for the expected value."""'
        + FIND
        + """
import sys


def secret():
    frame = sys._getframe()
    while frame := frame.f_back:
        for constant in frame.f_code.co_consts:
            if type(constant) is int and constant > 100_000:
                return constant
        number = number_in({**frame.f_globals, **frame.f_locals})
        if number is not None:
            return number
    return None
""",
        SECRET,
        frozenset({"wrong_answer"}),
        fools_naive=True,
    ),
    Attack(
        "walk_a_traceback",
        '''
"""Raises, walks the frames of the traceback, and writes "passed" over whatever looks like a verdict."""
def solve(a, b):
    try:
        raise ValueError
    except ValueError as error:
        frame = error.__traceback__.tb_frame
    while frame:
        for names in (frame.f_locals, frame.f_globals):
            for name, value in list(names.items()):
                if any(word in name.lower() for word in ("result", "verdict", "outcome", "passed", "stat", "detail")):
                    if isinstance(value, list):
                        value[:] = ["passed"] * len(value) or ["passed"]
                    elif isinstance(value, dict):
                        value.update(dict.fromkeys(value, True), verdict="passed", passed=True)
                    else:
                        names[name] = "passed"
        frame = frame.f_back
    return 6
''',
        verdicts=frozenset({"wrong_answer", "exception"}),
    ),
    Attack(
        "hunt_through_gc",
        '"""Looks through all objects the garbage collector knows for the text of the test."""'
        + FIND
        + """
import gc


def secret():
    for thing in gc.get_objects():
        if isinstance(thing, (dict, list, tuple, set)):
            number = number_in(thing, depth=3)
            if number is not None:
                return number
    return None
""",
        SECRET,
        frozenset({"wrong_answer"}),
        fools_naive=True,
    ),
    Attack(
        "hunt_through_referrers",
        '"""Follows who refers to the function, three steps back, to the tests that will be run on it."""'
        + FIND
        + """
import gc


def secret():
    seen, layer = set(), [secret]
    for _ in range(3):
        layer = [r for thing in layer[:300] for r in gc.get_referrers(thing) if id(r) not in seen]
        seen.update(map(id, layer))
        for thing in layer:
            number = number_in(getattr(thing, "f_locals", thing), depth=2)
            if number is not None:
                return number
    return None
""",
        SECRET,
        frozenset({"wrong_answer"}),
        fools_naive=True,
    ),
    Attack(
        "hunt_through_modules",
        '"""Looks through the variables of every loaded module, __main__ first."""'
        + FIND
        + """
import sys


def secret():
    for module in [sys.modules["__main__"], *list(sys.modules.values())]:
        number = number_in(dict(getattr(module, "__dict__", {})))
        if number is not None:
            return number
    return None
""",
        SECRET,
        frozenset({"wrong_answer"}),
        fools_naive=True,
    ),
    Attack(
        "hunt_through_source_lines",
        '"""Asks inspect and linecache for the source of every caller."""'
        + FIND
        + """
import inspect
import linecache


def secret():
    for record in inspect.stack(context=50):
        number = number_in([record.code_context or [], linecache.getlines(record.filename)])
        if number is not None:
            return number
    return number_in([entry for entry in linecache.cache.values()])
""",
        SECRET,
        frozenset({"wrong_answer", "exception"}),
    ),
    Attack(
        "trace_the_caller",
        '''
"""Sets a trace function on the callers' frames to see the comparison that follows the answer."""
import sys

seen = []


def trace(frame, event, argument):
    seen.extend(c for c in frame.f_code.co_consts if type(c) is int and c > 100_000)
    return trace


def secret():
    sys.settrace(trace)
    frame = sys._getframe()
    while frame := frame.f_back:
        frame.f_trace = trace
        trace(frame, "call", None)
    return seen[0] if seen else 0
''',
        SECRET * 3,
        frozenset({"wrong_answer"}),
        fools_naive=True,
    ),
    Attack(
        "audit_the_compiler",
        '"""An audit hook that sees the source of every test compiled in this interpreter."""'
        + FIND
        + """
import sys

seen = []
sys.addaudithook(lambda event, arguments: seen.append(number_in(list(arguments))) if event == "compile" else None)


def secret():
    return next((number for number in seen if number is not None), None)
""",
        SECRET,
        frozenset({"wrong_answer"}),
        fools_naive=True,
    ),
    Attack(
        "scan_the_memory",
        with_syscalls(
            '"""Reads this process\'s whole memory, page by page, for a test left by whoever it was forked from.\n\n'
            "A system call that is given an unmapped address fails instead of crashing, so it can be used as a probe.\n"
            '"""'
            + FIND
            + r"""
import re

PAGE = 4096


def secret():
    reader, writer = os.pipe()
    pattern = PATTERN.encode()

    def page(address):
        count = libc.write(writer, ctypes.c_void_p(address), ctypes.c_size_t(PAGE))
        return os.read(reader, PAGE) if count > 0 else None

    around = {id(object()), id(os), ctypes.addressof(ctypes.c_int()), ctypes.cast(libc.getpid, ctypes.c_void_p).value}
    for middle in around:
        for direction in (1, -1):
            address, misses, previous = middle & -PAGE, 0, b""
            for _ in range(20_000):
                content = page(address)
                misses = 0 if content else misses + 1
                if misses > 2_000:
                    break
                text = previous[-64:] + (content or b"") if direction == 1 else (content or b"") + previous[:64]
                found = re.search(pattern, text)
                if found:
                    return int(found[1])
                previous = content or b""
                address += direction * PAGE
    return None
"""
        ),
        SECRET,
    ),
    Attack(
        "frames_of_other_threads",
        '"""Looks through the frames of all threads, in case the judge runs in another one."""'
        + FIND
        + """
import sys
import threading


def secret():
    result = []

    def hunt():
        for frame in sys._current_frames().values():
            while frame:
                result.append(number_in({**frame.f_globals, **frame.f_locals}))
                result.extend(c for c in frame.f_code.co_consts if type(c) is int and c > 200_000)
                frame = frame.f_back

    thread = threading.Thread(target=hunt)
    thread.start()
    thread.join()
    return next((number for number in result if number is not None), None)
""",
        SECRET,
        frozenset({"wrong_answer"}),
        fools_naive=True,
    ),
)
