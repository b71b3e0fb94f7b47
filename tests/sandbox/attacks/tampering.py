"""Changes to the interpreter that a judge in the same interpreter would work with."""

from attacks import FAULTS, SECRET, SORT, Attack

FAILED = frozenset({"wrong_answer", "exception", "violation"})

ATTACKS = (
    Attack(
        "patched_builtins",
        '''
"""Replaces the builtins that a comparison or an encoder could call."""
import builtins

for name in ("len", "isinstance", "type", "id", "repr", "str", "int", "float", "bool", "list", "tuple", "dict", "set",
             "sorted", "all", "any", "abs", "min", "max", "sum", "iter", "next", "getattr", "hasattr", "callable"):
    setattr(builtins, name, lambda *args, **kwargs: True)


def solve(a, b):
    return 6
''',
    ),
    Attack(
        "patched_exec",
        '''
"""Replaces exec, eval and compile, so that a test is run without its asserts."""
import builtins

builtins.exec = builtins.eval = lambda *args, **kwargs: None
builtins.compile = lambda *args, **kwargs: (lambda: None).__code__


def solve(a, b):
    return 6
''',
        verdicts=FAILED,
        fools_naive=True,
    ),
    Attack(
        "patched_assertion_error",
        '''
"""Makes AssertionError something that nobody catches, and everything else an AssertionError."""
import builtins

builtins.AssertionError = StopIteration
builtins.Exception = builtins.BaseException = AssertionError


def solve(a, b):
    return 6
''',
    ),
    Attack(
        "patched_import",
        '''
"""Replaces __import__ and the finders, so that whatever is imported later is the program's."""
import builtins
import sys


class Everything:
    def __getattr__(self, name):
        return lambda *args, **kwargs: 5


builtins.__import__ = lambda *args, **kwargs: Everything()
sys.meta_path[:] = []
sys.path_hooks[:] = []
sys.path[:] = []


def solve(a, b):
    return 6
''',
    ),
    Attack(
        "poisoned_modules",
        '''
"""Replaces the modules that carry answers: json, pickle, marshal, struct, socket, os."""
import sys
import types

for name in "json json.encoder pickle marshal struct socket _socket select os io base64".split():
    fake = types.ModuleType(name)
    fake.__getattr__ = lambda attribute: lambda *args, **kwargs: b"5"
    sys.modules[name] = fake


def solve(a, b):
    return 6
''',
        verdicts=FAILED,
    ),
    Attack(
        "patched_functions_of_modules",
        '''
"""Replaces the functions of the modules instead, which those who hold the module already will call."""
import json
import marshal
import os
import pickle
import struct
import time

json.dumps = pickle.dumps = marshal.dumps = lambda *args, **kwargs: "5"
json.JSONEncoder.encode = json.JSONEncoder.iterencode = lambda self, value: "5"
struct.pack = lambda *args: b"\\x00" * 8
os.write = os.read = lambda *args: b""
time.time = time.monotonic = lambda: 0.0


def solve(a, b):
    return 6
''',
        verdicts=FAULTS,
    ),
    Attack(
        "every_function_of_the_harness",
        '''
"""Replaces every function of every module that does not belong to the library by one that answers 5."""
import sys
import types

for name, module in list(sys.modules.items()):
    if name.partition(".")[0] not in sys.stdlib_module_names or name == "__main__":
        for key, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType):
                value.__code__ = (lambda *args, **kwargs: 5).__code__


def solve(a, b):
    return 6
''',
        verdicts=FAULTS,
    ),
    Attack(
        "every_code_object_of_the_harness",
        '''
"""Finds every function alive, by the garbage collector, and makes those that encode or send answer for it."""
import gc
import types

for thing in gc.get_objects():
    if isinstance(thing, types.FunctionType) and not thing.__closure__:
        if any(word in thing.__name__ for word in "encode dump send write answer reply check judge".split()):
            try:
                thing.__code__ = (lambda *args, **kwargs: b"5").__code__
            except ValueError:
                pass


def solve(a, b):
    return 6
''',
        verdicts=FAULTS,
    ),
    Attack(
        "changed_small_ints",
        '''
"""Writes 5 into the interpreter's one object for 6: its 6 is then 5, but so is everybody else's in this process."""
import ctypes

ctypes.c_uint32.from_address(id(914) + 24).value = 273


def secret():
    number = 6
    ctypes.memmove(id(7) + 24, id(number) + 24, 4)
    return 7
''',
        SECRET,
    ),
    Attack(
        "patched_int_type",
        '''
"""Writes comparisons into the dictionaries of int and list, where Python code cannot, and clears the caches."""
import ctypes
import gc

for kind in (int, list, str, float, bool):
    names = gc.get_referents(kind.__dict__)[0]
    for name in ("__eq__", "__le__", "__ge__"):
        names[name] = lambda self, other: True
    names["__ne__"] = lambda self, other: False
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(kind))


def solve(values):
    return [9, 9, 9]
''',
        SORT,
        FAULTS,
    ),
    Attack(
        "patched_comparison_slot",
        '''
"""Gives int the rich comparison of an object that equals everything, in the C structure of the type."""
import ctypes


class Liar:
    __eq__ = __le__ = __ge__ = __lt__ = __gt__ = __ne__ = lambda self, other: True
    __hash__ = lambda self: 1


SLOT = 25 * ctypes.sizeof(ctypes.c_void_p)  # tp_richcompare
ctypes.memmove(id(int) + SLOT, id(Liar) + SLOT, ctypes.sizeof(ctypes.c_void_p))


def solve(a, b):
    return 6
''',
        verdicts=FAULTS,
    ),
    Attack(
        "patched_signals_and_gc",
        '''
"""Turns off what a harness may rely on: the collector, the thread switches, the recursion limit, the handlers."""
import gc
import signal
import sys

gc.disable()
gc.set_threshold(1)
sys.setswitchinterval(1000)
sys.setrecursionlimit(50)
for number in signal.valid_signals():
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass


def solve(a, b):
    return 6
''',
        verdicts=frozenset({"wrong_answer", "exception"}),
    ),
    Attack(
        "patched_streams",
        '''
"""Replaces the standard streams by objects that raise, or are None, and closes the real ones."""
import sys


class Broken:
    def __getattr__(self, name):
        raise SystemExit(0)


for name in ("stdin", "stdout", "stderr"):
    getattr(sys, name).close()
    setattr(sys, name, Broken())
    setattr(sys, f"__{name}__", None)


def solve(a, b):
    return 6
''',
        verdicts=frozenset({"wrong_answer", "exception"}),
    ),
    Attack(
        "callback_in_the_collector",
        '''
"""Hooks the garbage collector and the allocator of weak references, to run in the middle of the harness."""
import gc
import os
import weakref


class Thing:
    pass


def run(*args):
    os._exit(0)


gc.callbacks.append(run)
gc.set_threshold(1, 1, 1)
kept = weakref.finalize(Thing(), run)


def solve(a, b):
    return 6
''',
        verdicts=frozenset({"wrong_answer", "exception", "violation"}),
    ),
    Attack(
        "profiled_harness",
        '''
"""Sets profile and trace functions that end the process or change variables of whoever runs next."""
import sys
import threading


def hook(frame, event, argument):
    frame.f_globals["passed"] = True
    if event == "return" and frame.f_code.co_name != "solve":
        raise SystemExit(0)
    return hook


sys.setprofile(hook)
threading.setprofile(hook)


def solve(a, b):
    return 6
''',
        verdicts=FAULTS,
    ),
)
