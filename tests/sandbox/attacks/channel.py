"""Attacks on the connection that carries calls and answers, with and without knowledge of its format.

The programs find every descriptor that is a socket or a pipe and use it raw; some use the sandbox's own modules where
they can be imported or lie in sys.modules, as a program written against this very sandbox would.
"""

from attacks import QUICK, SECRET, SLEEPER, SORT, Attack, Limits

REFUSED = frozenset({"violation", "exception", "wrong_answer", "output_limit", "timeout"})

FIND = '''
import json
import os
import select
import socket
import stat
import struct
import sys
import time


def channels():
    """Every descriptor that could lead to the judge."""
    found = []
    for descriptor in range(3, 1024):
        try:
            mode = os.fstat(descriptor).st_mode
        except OSError:
            continue
        if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
            found.append(descriptor)
    return found


def write(descriptor, data):
    try:
        os.set_blocking(descriptor, False)
        return os.write(descriptor, data)
    except OSError:
        return 0


def frame(text):
    text = text if isinstance(text, bytes) else text.encode()
    return len(text).to_bytes(4, "big") + text


def answer(value, kind="value"):
    """The frame that answers the request being served with a value, or an error, of our own making."""
    caller, nonce = sys._getframe(), 0
    while caller:
        request = caller.f_locals.get("request")
        if isinstance(request, dict) and "nonce" in request:
            nonce = request["nonce"]
        caller = caller.f_back
    return frame('{"nonce":%s,"%s":%s}' % (json.dumps(nonce), kind, value))
'''


def _attack(name: str, says: str, body: str, tests=None, verdicts=REFUSED, limits=QUICK, **kwargs) -> Attack:
    return Attack(
        name,
        f'"""{says}"""\n{FIND}\n\n{body.strip()}\n',
        verdicts=verdicts,
        limits=limits,
        **({"tests": tests} if tests else {}),
        **kwargs,
    )


def _forged(name: str, says: str, data: str, **kwargs) -> Attack:
    """Sends `data`, an expression of bytes, before the answer."""
    return _attack(name, says, FORGE.replace("DATA", data), **kwargs)


FORGE = """
def solve(a, b):
    for descriptor in channels():
        write(descriptor, DATA)
    time.sleep(0.02)
    return 6
"""

# Answers as this sandbox's own protocol writes them; whatever the frame around, the value inside is tagged JSON.
VALUES = {
    "fraction": '{"Fraction":["1e999999999"]}',
    "fraction_of_floats": '{"Fraction":[0.5,0]}',
    "record": '{"record":[[1],[2],"R"]}',
    "record_of_code": '{"record":[["__class__","__eq__","mro"],[1,2,3],"R"]}',
    "deque": '{"deque":[[1],-1]}',
    "decimal": '{"Decimal":["1e99999999999999999999"]}',
    "date": '{"datetime":["' + "9" * 100 + '",null,0]}',
    "unhashable_key": '{"d":[[[1],2]]}',
    "unknown_tag": '{"zzz":5}',
    "no_tag": "{}",
    "two_tags": '{"t":[],"set":[]}',
    "handle_of_nobody": '{"h":10000000}',
    "hexadecimal": '{"i":"zz"}',
    "surrogates": '{"u":"zz"}',
    "range": '{"range":[0,10,0]}',
    "deep": "[" * 100_000,
    "not_json": '{"answer":',
    "nan": "[NaN,-Infinity,1e999]",
    "digits": "9" * 100_000,
    "counter": '{"Counter":[["a",{"t":[]}]]}',
    "handle_of_infinity": '{"h":[1e999,"c"]}',
    "handle_of_digits": '{"h":["' + "9" * 50_000 + '",{}]}',
    "record_of_a_handle": '{"record":[["a"],{"h":[0,"li"]},"R"]}',
    "record_of_names_equal_in_nfkc": '{"record":[["\\ufb01","fi"],[1,2],"R"]}',
    "nested_records": '{"record":[["a"],[' * 200 + "1" + '],"R"]}' * 200,
}
ERRORS = {
    "nothing": "5",
    "no_bases": '{"type":"ValueError"}',
    "odd_bases": '{"type":[1],"bases":[[],{},5,null,"exec","type","SystemExit"],"message":{"a":1}}',
    "control_flow": '{"type":"StopIteration","bases":["StopIteration","Exception"],"message":5}',
    "exit": '{"type":"SystemExit","bases":["SystemExit"],"message":0}',
    "group": '{"type":"G","bases":["ExceptionGroup","UnicodeDecodeError"],"message":[]}',
    "own_error": '{"type":"TestStuck","bases":["TestStuck","Ended","object","AssertionError"],"message":"passed"}',
    "long_message": '{"type":"ValueError","bases":["ValueError"],"message":"' + "\\\\n\\\\u001b[2J" * 10_000 + '"}',
}

ATTACKS = (
    _forged(
        "forged_json",
        "Writes a right answer, as text, to whatever leads out.",
        "json.dumps({'answer': 5, 'result': 5}).encode()",
    ),
    _forged(
        "forged_frame",
        "The same in a frame, for many numbers of the call.",
        "b''.join(frame(json.dumps([n, 5])) + frame(json.dumps({'nonce': n, 'value': 5})) for n in range(50))",
    ),
    _forged(
        "forged_verdict",
        "Sends a verdict instead of an answer.",
        "frame(json.dumps({'verdict': 'passed', 'detail': '', 'tests': ['passed'], 'cpu_seconds': 0}))",
    ),
    _forged(
        "huge_length",
        "Announces a frame of 4 GB that never comes.",
        "b'\\xff\\xff\\xff\\xff' + b'x' * 100",
        verdicts=REFUSED,
    ),
    _forged("half_a_header", "Sends two bytes of a header.", "b'\\x00\\x00'"),
    _forged("zero_length", "Sends a thousand empty frames.", "bytes(4000)"),
    _forged("noise", "Sends noise.", "os.urandom(5000)"),
    _forged(
        "negative_or_float_numbers",
        "Answers calls that were never made.",
        "frame('[-1, 5]') + frame('[0.5, 5]') + frame('[true, 5]') + frame('null')",
    ),
    _attack(
        "close_everything",
        "Closes every descriptor.",
        """
def solve(a, b):
    os.closerange(0, 1024)
    return 6
""",
        verdicts=REFUSED,
    ),
    _attack(
        "close_everything_at_import",
        "Closes every descriptor before the first call.",
        """
os.closerange(0, 1024)


def solve(a, b):
    return 6
""",
    ),
    _attack(
        "replace_everything",
        "Puts one end of its own pair in the place of every descriptor, so that it asks itself.",
        """
left, right = socket.socketpair()


def solve(a, b):
    for descriptor in channels():
        if descriptor not in (left.fileno(), right.fileno()):
            os.dup2(left.fileno(), descriptor)
    right.send(frame('[0, 5]') * 10)
    return 6
""",
        limits=SLEEPER,
    ),
    _attack(
        "shut_down",
        "Shuts the connection down in both directions, or in one.",
        """
def solve(a, b):
    for descriptor in channels():
        try:
            socket.socket(fileno=descriptor).shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
    return 6
""",
    ),
    _attack(
        "stop_reading",
        "Shuts the reading side only and answers on.",
        """
def solve(a, b):
    for descriptor in channels():
        try:
            socket.socket(fileno=os.dup(descriptor)).shutdown(socket.SHUT_RD)
        except OSError:
            pass
    return 6
""",
        ("assert solve(2, 3) == 6", "assert solve(2, 3) == 5"),
    ),
    _attack(
        "read_ahead",
        "Reads whatever the judge sends next, in the hope that it names the expected value, and answers with it.",
        r"""
import re


def secret():
    content = b''
    for descriptor in channels():
        try:
            os.set_blocking(descriptor, False)
            content += os.read(descriptor, 1 << 16)
        except OSError:
            pass
    found = re.search(rb'\d{6}', content)
    return int(found[0]) if found else 0
""",
        SECRET,
    ),
    _attack(
        "read_ahead_in_a_thread",
        "Steals the judge's requests from under the harness and looks through them.",
        r"""
import re
import threading

seen = []


def steal():
    while True:
        for descriptor in channels():
            try:
                seen.append(socket.socket(fileno=os.dup(descriptor)).recv(4096, socket.MSG_PEEK))
            except OSError:
                pass


threading.Thread(target=steal, daemon=True).start()


def secret():
    time.sleep(0.05)
    found = re.search(rb'\d{6}', b' '.join(seen))
    return int(found[0]) if found else 0
""",
        SECRET * 3,
    ),
    _attack(
        "drip",
        "Sends a frame one byte at a time, slower than any timeout for a single read.",
        """
def solve(a, b):
    for byte in (1000).to_bytes(4, 'big') + b'[' * 1000:
        for descriptor in channels():
            write(descriptor, bytes([byte]))
        time.sleep(0.1)
    return 6
""",
        limits=SLEEPER,
    ),
    _attack(
        "answer_and_never_stop",
        "Answers without end.",
        """
def solve(a, b):
    while True:
        for descriptor in channels():
            write(descriptor, frame('[0,5]') * 1000)
""",
    ),
    _attack(
        "fill_the_channel_with_descriptors",
        "Sends open descriptors along, which pile up in a reader that accepts them.",
        """
import array


def solve(a, b):
    for descriptor in channels():
        for _ in range(50):
            try:
                os.set_blocking(descriptor, False)
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0] * 200))
                socket.socket(fileno=os.dup(descriptor)).sendmsg([b'x'], [rights])
            except OSError:
                pass
    return 6
""",
    ),
    _attack(
        "socket_options",
        "Makes the buffers as small, and the waits as odd, as they can be.",
        """
def solve(a, b):
    for descriptor in channels():
        s = socket.socket(fileno=os.dup(descriptor))
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF, socket.SO_RCVLOWAT, socket.SO_PASSCRED):
            try:
                s.setsockopt(socket.SOL_SOCKET, option, 1)
            except OSError:
                pass
    return 'x' * 100_000
""",
    ),
    _attack(
        "patched_encoder",
        "Makes the sandbox's own encoder answer with another value than the function's.",
        """
for name, module in list(sys.modules.items()):
    for key, value in list(vars(module).items()):
        if isinstance(value, type) and 'ncode' in key and name.partition('.')[0] not in sys.stdlib_module_names:
            for method in ('encode', '_encode'):
                if hasattr(value, method):
                    setattr(value, method, lambda self, *args: 6)


def secret():
    return 0
""",
        SECRET,
        frozenset({"wrong_answer"}),
    ),
    _attack(
        "send_twice",
        "Replaces what sends by what sends everything twice.",
        """
import functools

ours = [m for name, m in sys.modules.items() if name.partition('.')[0] not in sys.stdlib_module_names]
for module in ours:
    for key, value in list(vars(module).items()):
        if key in ('send', 'reply', 'answer') and callable(value):
            setattr(module, key, lambda *args, _send=value, **kwargs: (_send(*args, **kwargs), _send(*args, **kwargs)))
original = socket.socket.sendall


def solve(values):
    for descriptor in channels():
        write(descriptor, frame('[0, [9]]'))
    return [9]
""",
        SORT,
    ),
    _attack(
        "late_answer",
        "A thread sends answers while the judge is thinking, so that one of them meets the next call.",
        """
import threading


def sender():
    for _ in range(2000):
        for descriptor in channels():
            write(descriptor, frame('[1, 5]'))
        time.sleep(0.0005)


def solve(a, b):
    threading.Thread(target=sender, daemon=True).start()
    return 5 if a == 0 else 6
""",
        ("assert solve(0, 5) == 5", "assert solve(2, 3) == 5"),
    ),
    *(
        _forged(
            f"forged_value_{name}",
            f"Forges a malformed or costly value: {name.replace('_', ' ')}.",
            f"answer({text!r})",
        )
        for name, text in VALUES.items()
    ),
    *(
        _forged(f"forged_error_{name}", f"Forges an exception: {name.replace('_', ' ')}.", f"answer({text!r}, 'error')")
        for name, text in ERRORS.items()
    ),
    _attack(
        "forged_set_of_colliding_hashes",
        "Forges a set that takes the judge quadratic time to rebuild, which no program could build itself.",
        """
def solve(a, b):
    items = ",".join('{"i":"%x"}' % (i * (2**61 - 1)) for i in range(1, 300_000))
    data = answer('{"set":[216,[%s]]}' % items)
    for descriptor in channels():
        os.set_blocking(descriptor, True)
        while data:
            data = data[os.write(descriptor, data) :]
    time.sleep(5)
""",
        verdicts=frozenset({"timeout", "violation", "output_limit"}),
        limits=Limits(cpu_seconds=1.0, wall_seconds=2.0),
    ),
    _attack(
        "unasked_beyond_all_it_may_say",
        "Answers rightly, each answer as long as it may be, and after the last says what is too much in all.",
        """
calls = 0


def send(data):
    while data:
        data = data[os.write(3, data) :]


def answered(request, value):
    head = ('{"nonce":"%s","value":%d' % (request["nonce"], value)).encode()
    send(frame(head + b" " * ((1 << 20) - len(head) - 5) + b"}"))


def solve(a, b):
    global calls
    calls += 1
    if calls <= 3:
        return a + b
    caller = sys._getframe()
    while "request" not in caller.f_locals:
        caller = caller.f_back
    request = caller.f_locals["request"]
    answered(request, a + b)
    while True:  # serves the next calls itself
        size, data = int.from_bytes(os.read(3, 4), "big"), b""
        while len(data) < size:
            data += os.read(3, size - len(data))
        request = json.loads(data)
        calls += 1
        answered(request, sum(request["a"][1:]))
        if calls == 7:
            time.sleep(0.3)
            send(b" " * 120_000)
            time.sleep(20)
""",
        tests=(
            *(f"assert solve({k}, 1) == {k + 1}" for k in range(6)),
            "assert solve(6, 1) == 7\nimport time; time.sleep(1)",
        ),
        verdicts=frozenset({"violation"}),
        limits=Limits(cpu_seconds=5.0, wall_seconds=10.0, output_bytes=1 << 20),
    ),
)

# Not an attack but the proof that the forged values above are read as answers: this one is right, and passes.
FORGED_RIGHTLY = _forged("forged_value_that_is_right", "Sends a right answer past the harness.", "answer('5')")
