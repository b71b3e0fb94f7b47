"""Memory that a program holds, in whatever way, and time that it takes from the programs beside it."""

import mmap
import os
import resource
import select
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from wmtp.sandbox import AssertionJob, Limits, Sandbox, StdioJob, StdioTest, pool, syscalls
from wmtp.sandbox.usage import ResidentMemory, own_usage, starved, usage_of

pytestmark = pytest.mark.skipif(not syscalls.SUPPORTED, reason="confinement needs Linux on x86-64 or aarch64")

SMALL = Limits(cpu_seconds=20, wall_seconds=120, memory_bytes=128 << 20)
KEY = "limits.memory_bytes"


@pytest.fixture
def busy_cpu():
    """A CPU on which another process spins."""
    cpu = min(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nprint(flush=True)\nwhile True: pass"
    spinner = subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE)
    spinner.stdout.readline()
    yield cpu
    spinner.kill()
    spinner.wait()
    spinner.stdout.close()


@pytest.fixture(scope="module", params=["watched", "address space"])
def sandbox(request):
    """Where the zygote sees what a program holds, and where only the address space can be limited."""
    with Sandbox(workers=1, limits=SMALL, _without=("resident memory",) * (request.param == "address space")) as box:
        if request.param == "watched" and "resident memory" not in box.layers:
            pytest.skip("; ".join(box.missing))
        yield box


def judge(sandbox, program, test="assert f(1) == 1", **fields):
    return sandbox.judge([AssertionJob(textwrap.dedent(program), (test,), **fields)])[0]


def run(sandbox, program, output=""):
    return sandbox.judge([StdioJob(textwrap.dedent(program), (StdioTest("", output),))])[0]


HOLDS_TOO_MUCH = {
    "one text": "x = 'x' * (1 << 29)",
    "many lists": "x = [[0] * 1000 for _ in range(1 << 20)]",
    "anonymous maps": """
        import mmap
        maps = [mmap.mmap(-1, 16 << 20) for _ in range(32)]
        for page in maps:
            page[::4096] = b'x' * 4096
    """,
    "pages made read-only": """
        import ctypes, mmap
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        for _ in range(64):
            size = 8 << 20
            address = libc.mmap(None, ctypes.c_size_t(size), 3, 0x22, -1, ctypes.c_long(0))
            if address is None or address == ctypes.c_void_p(-1).value:
                raise MemoryError
            ctypes.memset(address, 1, size)
            libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 1)
        import time
        time.sleep(1)
    """,
    "threads": """
        import threading
        stop = threading.Event()
        for _ in range(8):
            threading.Thread(target=lambda kept: stop.wait(), args=(bytearray(b'x') * (30 << 20),), daemon=True).start()
    """,
    "an exception that is none of MemoryError": "raise OSError(12, 'Cannot allocate memory')",
    "a library that does not fit": "raise ImportError('libx.so: failed to map segment from shared object')",
    "torch's words": "raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried')",
    "a subclass": "class E(MemoryError): pass\nraise E('Unable to allocate 8.00 TiB')",
    "C++": 'import os\nos.write(2, b"terminate called: what():  std::bad_alloc")\nos.abort()',
    "a fault near the limit": """
        import ctypes
        x = bytearray(b'x') * (125 << 20)
        ctypes.string_at(0)
    """,
}


@pytest.mark.parametrize("way", HOLDS_TOO_MUCH)
def test_a_program_without_memory_is_told_so_with_the_key(sandbox, way):
    program = textwrap.dedent(HOLDS_TOO_MUCH[way])
    for outcome in (judge(sandbox, program + "\ndef f(x): return x"), run(sandbox, program)):
        assert outcome.verdict == "memory" and KEY in outcome.detail and str(SMALL.memory_bytes) in outcome.detail


NO_MATTER_OF_MEMORY = {
    "no such file": "open('nowhere')",
    "another errno": "raise OSError(28, 'No space left on device')",
    "a library that may not be mapped": "raise ImportError('x.so: failed to map segment: operation not permitted')",
    "a value": "raise ValueError('cannot allocate memory for 3 apples')",
    "a fault far from the limit": "import ctypes\nctypes.string_at(0)",
    "an abort": "import os\nos.abort()",
}


@pytest.mark.parametrize("way", NO_MATTER_OF_MEMORY)
def test_other_ends_are_not_taken_for_it(sandbox, way):
    for outcome in (
        judge(sandbox, NO_MATTER_OF_MEMORY[way] + "\ndef f(x): return x"),
        run(sandbox, NO_MATTER_OF_MEMORY[way]),
    ):
        assert outcome.verdict == "exception" and KEY not in outcome.detail


@pytest.fixture(scope="module")
def watched():
    with Sandbox(workers=1) as box:
        if "resident memory" not in box.layers:
            pytest.skip("; ".join(box.missing))
        yield box


def test_what_is_never_touched_does_not_count(watched):
    program = "import mmap\nm = mmap.mmap(-1, 900 << 20)\ndef f(x): return x"
    assert judge(watched, program, limits=SMALL).verdict == "passed"


def test_torch_fits_a_gibibyte(watched):
    program = "import torch\ndef f(x): return int(torch.full((1 << 20,), x).sum()) >> 20"
    outcome = judge(watched, program, limits=Limits(cpu_seconds=100, wall_seconds=300))
    assert outcome.verdict == "passed", outcome


def test_memory_that_no_count_shows_cannot_be_had(watched):
    """Shared anonymous pages stay when no map shows them any more; a private map is the same in one process."""
    program = """
    import ctypes, mmap
    def f(shared):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        address = libc.mmap(None, ctypes.c_size_t(4096), 3, 0x20 | (1 if shared else 2), -1, ctypes.c_long(0))
        return address not in (None, ctypes.c_void_p(-1).value)
    def g():
        found = []
        for settings in ({}, {"access": mmap.ACCESS_WRITE}, {"flags": mmap.MAP_SHARED, "prot": mmap.PROT_WRITE | 1}):
            with mmap.mmap(-1, 8192, **settings) as page:
                page[:3] = b"abc"
                found.append(page[:4])
        return found
    """
    test = "assert f(False) and not f(True) and g() == [b'abc\\0'] * 3"
    assert judge(watched, program, test).verdict == "passed"


def test_memory_is_counted_from_outside():
    watch = ResidentMemory()
    before, held = watch.own(), mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE)  # nothing that was free already
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    assert 32 << 20 <= watch.own() - before < 64 << 20
    child = os.fork()
    if child == 0:
        os._exit(0)
    descriptor = os.pidfd_open(child)
    os.waitpid(child, 0)
    assert watch.of(descriptor) == 0
    os.close(descriptor)
    held.close()


# ---- Time


def test_who_sleeps_past_the_clock_is_judged_once():
    program = "import time\ntime.sleep(99)\nf = abs"
    jobs = [AssertionJob(program, ("assert f(1) == 1",)), StdioJob(program, (StdioTest("", ""),))]
    times_alone = []
    while 0 not in times_alone and len(times_alone) < 4:  # a busy machine may keep a program even from its sleep
        with Sandbox(workers=2, limits=Limits(wall_seconds=6.0)) as box:
            assert [outcome.verdict for outcome in box.judge(jobs)] == ["timeout", "timeout"]
            times_alone.append(box.times_alone)
    assert 0 in times_alone


def test_who_was_starved_is_judged_again_alone_while_there_is_time_for_it(busy_cpu):
    """A zygote and its programs on one CPU beside a busy process: the program computes, and is not let."""
    with Sandbox(workers=1, limits=Limits(wall_seconds=1.0, cpu_seconds=50.0)) as box:
        for process in psutil.Process().children(recursive=True):
            process.cpu_affinity([busy_cpu])
        program = "while True: pass"
        outcome = judge(box, program)
        assert outcome.verdict == "timeout" and box.times_alone == 1
        assert outcome.detail.endswith("no end after 2 s by the clock")  # twice the time, alone
        box._gate._seconds = box._gate._share = 0
        outcome = judge(box, program)
        assert outcome.verdict == "timeout" and box.times_alone == 1
        assert outcome.detail.endswith("(not judged again alone: the time for that is spent)")


@pytest.mark.parametrize(
    ("wall", "cpu", "preempted", "read", "expected"),
    [
        (5.0, 0.02, 2, 0, False),  # slept
        (5.0, 0.6, 172, 0, True),  # took turns with three others
        (30.0, 3.0, 300, 0, True),  # a CPU quota of a tenth
        (30.0, 1.9, 3, 2000, True),  # imported a large library from a slow disk
        (5.0, 4.8, 200, 0, False),  # had nearly all the time: it would have been late alone
        (10.0, 1.0, 30, 0, False),  # slept, beside a little turning
    ],
)
def test_starved_is_who_was_put_aside(wall, cpu, preempted, read, expected):
    assert starved(wall, {"cpu": cpu, "preempted": preempted, "read": read}) is expected
    half = {"cpu": cpu / 2, "preempted": preempted / 2, "read": read / 2}
    assert starved(wall, half, half) is expected  # the program and the judge, by turns


@pytest.mark.parametrize(
    ("waited", "expected"),
    [
        (0.5, False),  # computed for a second beside others, was put aside 100 times for it, and then slept
        (5.0, True),  # half of the time without a CPU
    ],
)
def test_the_kernels_own_count_says_who_was_starved(waited, expected):
    assert starved(10.0, {"cpu": 1.0, "preempted": 100, "read": 0, "waited": waited}) is expected
    assert starved(10.0, {"cpu": 1.0, "preempted": 100, "read": 0})  # without it
    taken_by_the_host = {"cpu": 0.0, "preempted": 0, "read": 0, "waited": 0.0, "stolen": 5.0}
    assert starved(10.0, {"cpu": 1.0, "preempted": 100, "read": 0, "waited": waited}, taken_by_the_host)


def test_time_without_a_cpu_is_the_kernels_own_count(busy_cpu):
    """A child computes beside a busy process on one CPU, and a sleeper sleeps there."""
    memory = ResidentMemory()
    waited = []
    for action in ("while time.process_time() < 0.3: pass", "time.sleep(0.6)"):
        code = f"import os, sys, time\nos.sched_setaffinity(0, {{{busy_cpu}}})\nprint(flush=True)\n{action}"
        child = subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE)
        ended = os.pidfd_open(child.pid)
        child.stdout.readline()
        begun = memory.waited(ended)
        if begun is None:
            pytest.skip("the kernel does not say how long a process waits for a CPU")
        select.select([ended], [], [])  # it is dead and not reaped
        waited.append(memory.waited(ended) - begun)
        child.wait()
        child.stdout.close()
        assert memory.waited(ended) is None  # gone
        os.close(ended)
    computes, sleeps = waited
    assert computes > 0.1 and computes > 3 * sleeps


def test_usage_is_that_of_the_process():
    before = own_usage()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    assert own_usage()["cpu"] - before["cpu"] >= 0.04
    assert usage_of(resource.getrusage(resource.RUSAGE_SELF)).keys() == {"cpu", "preempted", "read"}
    assert own_usage().keys() - {"waited", "stolen"} == {"cpu", "preempted", "read"}


def test_time_for_being_alone_is_at_least_the_seconds_and_else_the_share():
    gate = pool._Gate(2, seconds=100.0, share=0.0)
    with gate.alone() as granted:
        assert granted
    gate._spent = 100.0
    with gate.alone() as granted:
        assert not granted
    gate._share, gate._start = 0.25, time.monotonic() - 1000
    with gate.alone() as granted:
        assert granted
    assert gate.times_alone == 2
    with gate.shared():  # nobody holds it
        pass
