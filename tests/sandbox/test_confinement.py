"""What a program cannot reach, layer by layer, as root and as an ordinary user, in a container or not."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

import wmtp
from wmtp.sandbox import AssertionJob, Sandbox, confine, filesystem, seccomp, syscalls

pytestmark = pytest.mark.skipif(not syscalls.SUPPORTED, reason="confinement needs Linux on x86-64 or aarch64")

PACKAGE = Path(wmtp.__file__).parent
FILES_APART = {"landlock", "namespaces", "bubblewrap"}  # any one of them keeps a program from files outside

# Runs as any user, under any interpreter: starts a sandbox, has programs try what they must not do and what they must
# be able to do, and prints what came of it.
SCRIPT = '''
import ctypes, json, struct, sys
from wmtp.sandbox import AssertionJob, Sandbox, syscalls

settings = json.loads(sys.argv[1])


def forbid(numbers):
    """What a container's default profile does: no namespaces, no mounts; clone3 does not exist."""
    code = [(0x20, 0, 0, 0)]
    for number, error in numbers.items():
        code += [(0x15, 0, 1, int(number)), (0x06, 0, 0, 0x50000 | error)]
    code.append((0x06, 0, 0, 0x7FFF0000))
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in code))
    syscalls.prctl(38, 1)
    syscalls.prctl(22, 2, ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))))


if settings["container"]:
    x86 = syscalls.MACHINE == "x86_64"
    unshare, mount, umount, setns, pivot_root = (272, 165, 166, 308, 155) if x86 else (97, 40, 39, 268, 41)
    forbid(dict.fromkeys((unshare, mount, umount, setns, pivot_root), 1) | {435: 38})
test = "import json\\nresult = attempt()\\nassert type(result) is dict and not result, json.dumps(result)"
with Sandbox(workers=1, hidden=settings["hidden"], _without=tuple(settings["without"])) as sandbox:
    outcomes = sandbox.judge([AssertionJob(program, (test,)) for program in settings["programs"]])
    layers = [sandbox.layers, sandbox.missing]
print(json.dumps({"layers": layers, "outcomes": [[outcome.verdict, outcome.detail] for outcome in outcomes]}))
'''

FORBIDDEN = '''
import ctypes, fcntl, mmap, os, resource, shutil, signal, socket, subprocess, sys

libc = ctypes.CDLL(None, use_errno=True)
OUTSIDE, PACKAGE = @OUTSIDE@, @PACKAGE@


def call(name, *args):
    if getattr(libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), name)


def fork():
    if os.fork() == 0:
        os._exit(0)


ACTS = {
    "read a file": lambda: open(OUTSIDE).read(),
    "read the tasks' solutions": lambda: open(PACKAGE + "/data/tasks/functions.jsonl").read(),
    "write a file": lambda: open(OUTSIDE, "a"),
    "make a file": lambda: open(OUTSIDE + ".made", "w"),
    "list a folder": lambda: os.listdir(os.path.dirname(OUTSIDE)),
    "remove a file": lambda: os.remove(OUTSIDE),
    "truncate a file": lambda: os.truncate(OUTSIDE, 0),
    "truncate while reading": lambda: os.open(OUTSIDE, os.O_RDONLY | os.O_TRUNC),
    "change a library": lambda: open(os.__file__, "a"),
    "change a file's mode": lambda: os.chmod(OUTSIDE, 0o777),
    "change a library's mode": lambda: os.chmod(os.__file__, os.stat(os.__file__).st_mode & 0o7777),
    "change a file's times": lambda: os.utime(OUTSIDE),
    "change a file's owner": lambda: os.chown(OUTSIDE, os.getuid(), -1),
    "link to a file": lambda: os.link(OUTSIDE, "link"),
    "follow a link": lambda: (os.symlink(OUTSIDE, "symlink"), open("symlink").read()),
    "read /proc": lambda: open("/proc/self/status").read(),
    "read the parent's memory": lambda: open(f"/proc/{os.getppid()}/mem", "rb"),
    "change the root": lambda: os.chroot("."),
    "make a device": lambda: os.mknod("device", 0o600 | 0o020000, os.makedev(1, 1)),
    "fork": fork,
    "vfork": lambda: call("vfork"),
    "posix_spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "subprocess": lambda: subprocess.run([sys.executable, "-c", ""]),
    "execve": lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),
    "a TCP socket": socket.socket,
    "a UDP socket": lambda: socket.socket(type=socket.SOCK_DGRAM),
    "a UNIX socket": lambda: socket.socket(socket.AF_UNIX),
    "datagrams": lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),
    "signal the parent": lambda: os.kill(os.getppid(), 0),
    "signal all": lambda: os.kill(-1, 0),
    "signal the group": lambda: os.kill(0, 0),
    "have the kernel signal the parent": lambda: fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid()),
    "another's priority": lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 5),
    "another's processors": lambda: os.sched_setaffinity(os.getppid(), {0}),
    "another's limits": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1)),
    "raise a limit": lambda: resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6)),
    "become somebody": lambda: os.setuid(os.getuid()),
    "ptrace": lambda: call("ptrace", 0, 0, 0, 0),
    "namespaces": lambda: call("unshare", 0x10000000),
    "mount": lambda: call("mount", b"none", b".", b"tmpfs", 0, None),
    "shared memory that stays": lambda: call("shmget", 0x1234, 4096, 0o1600),
    "memory without a limit": lambda: os.memfd_create("x"),
    "memory that nobody counts": lambda: mmap.mmap.__base__(-1, 4096),
    "memory from a device": lambda: open("/dev/zero", "rb"),
    "loosen itself": lambda: call("prctl", 4, 1, 0, 0, 0),
    "the next program's module": lambda: open(os.path.join(os.path.dirname(os.__file__), "planted.py"), "w"),
}


def attempt():
    """The acts that were possible."""
    possible = {}
    for name, act in ACTS.items():
        try:
            possible[name] = repr(act())[:20]
        except (OSError, ValueError):
            pass
    return possible
'''

NEEDED = """
import asyncio, concurrent.futures, hashlib, os, tempfile, threading, zlib

@IMPORTS@


def write():
    with open("file", "w") as file:
        file.write("text")
    os.rename("file", "other")
    os.mkdir("folder")
    assert os.listdir("folder") == [] and open("other").read() == "text"


def temporary():
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"x")


def threads():
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(abs, range(-9, 1))) == 45


def devices():
    open(os.devnull, "w").write("x")
    assert len(open("/dev/urandom", "rb").read(4)) == 4


def attempt():
    failed = {}
    for act in (write, temporary, threads, devices, lambda: asyncio.run(asyncio.sleep(0))):
        try:
            act()
        except Exception as error:
            failed[act.__name__] = repr(error)
    if os.listdir(".") != ["folder", "other"] and sorted(os.listdir(".")) != ["folder", "other"]:
        failed["scratch"] = os.listdir(".")
    return failed
"""

NOT_ROOT = 65534


def try_out(folder, *, without=(), container=False, user=None, python=sys.executable, path=None, imports=""):
    """Layers and missing layers, after seeing that what is forbidden fails and what is needed works, twice over."""
    outside = folder / "outside"
    outside.write_text("kept")
    outside.chmod(0o644)
    before = outside.stat()
    forbidden = FORBIDDEN.replace("@OUTSIDE@", repr(str(outside))).replace("@PACKAGE@", repr(str(PACKAGE)))
    needed = NEEDED.replace("@IMPORTS@", imports)
    who = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    programs = [forbidden, needed, forbidden, needed]
    layers = run_script(programs, python, path or PACKAGE.parent, folder, without, container, **who)
    after = outside.stat()
    assert (after.st_size, after.st_mode, after.st_mtime) == (before.st_size, before.st_mode, before.st_mtime)
    return layers


def run_script(programs, python, path, folder, without, container=False, hidden=(), **who):
    """Layers and missing layers, after seeing that every program's `attempt` finds nothing to tell."""
    settings = {"without": without, "container": container, "hidden": list(map(str, hidden)), "programs": programs}
    environment = {"PYTHONPATH": str(path), "PATH": os.environ["PATH"]}
    command = [python, "-c", SCRIPT, json.dumps(settings)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, **who)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for verdict, detail in result["outcomes"]:
        assert verdict == "passed", detail
    return result["layers"]


@pytest.fixture(scope="module")
def offered():
    """The layers that this machine has, by their first word."""
    with Sandbox(workers=1, allow_unsafe=True) as sandbox:
        return {layer.split()[0] for layer in sandbox.layers}


@pytest.mark.parametrize("without", [(), ("landlock",), ("namespaces", "bubblewrap")], ids=str)
def test_each_way_of_keeping_files_apart_is_enough(offered, tmp_path, without):
    if not offered & (FILES_APART - set(without)) or not {"seccomp", "rlimits"} <= offered:
        pytest.skip(f"this kernel offers only {sorted(offered)}")
    layers, missing = try_out(tmp_path, without=without)
    for name in without:
        assert not any(layer.startswith(name) for layer in layers)
        assert name == "bubblewrap" or f"{name}: switched off" in missing


def test_in_a_container_that_forbids_namespaces_landlock_is_enough(offered, tmp_path):
    if "landlock" not in offered:
        pytest.skip("this kernel has no Landlock")
    layers, missing = try_out(tmp_path, container=True)
    assert any(layer.startswith("landlock") for layer in layers)
    assert any(reason.startswith("namespaces: ") for reason in missing)
    assert ("resident memory" in layers) == ("resident" in offered)


SOLUTIONS = '''
import os

SHOWN, HIDDEN = @SHOWN@, @HIDDEN@


def attempt():
    """Solutions that can be read by any of the paths, and files beside them that cannot."""
    found = {}
    for folder in SHOWN:
        names = [os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names]
        for path in {*names, *HIDDEN, os.path.join(folder, "numbers", "shown.py")}:
            try:
                if "the solution is 42" in open(path).read():
                    found[path] = "read"
            except OSError:
                if path.endswith("shown.py"):
                    found[path] = "not read"
    return found
'''


@pytest.mark.parametrize("through_a_link", [False, True])
@pytest.mark.parametrize("without", [(), ("landlock",), ("namespaces",), ("landlock", "namespaces")], ids=str)
def test_hidden_folders_and_the_package_are_out_of_sight(offered, tmp_path, without, through_a_link):
    """Where they lie among the libraries that a program may read: the default hides the whole package."""
    if not (offered - set(without)) & FILES_APART and not (len(without) == 2 and shutil.which("bwrap")):
        pytest.skip(f"this kernel offers only {sorted(offered)}, and bubblewrap may not be installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (tmp_path / "link").symlink_to("venv")
    (site,) = (tmp_path / ("link" if through_a_link else "venv")).glob("lib/python3*/site-packages")
    shutil.copytree(PACKAGE / "sandbox", site / "wmtp" / "sandbox")
    for folder in ("wmtp", "wmtp/eval", "numbers", "numbers/answers"):
        (site / folder).mkdir(exist_ok=True)
        (site / folder / "tasks.py").write_text("" if folder == "numbers" else "# the solution is 42\n")
    (site / "wmtp" / "__init__.py").touch()
    (site / "numbers" / "shown.py").write_text("")
    (site / "alias").symlink_to("numbers/answers")
    files = [str(site / folder / "tasks.py") for folder in ("wmtp", "wmtp/eval", "numbers/answers", "alias")]
    shown = [str(site), os.path.realpath(site)]
    program = SOLUTIONS.replace("@SHOWN@", repr(shown)).replace("@HIDDEN@", repr(files))
    python = str(site.parents[2] / "bin" / "python")
    run_script([program], python, site, tmp_path, without, hidden=[site / "numbers" / "answers", site / "wmtp/eval"])


def test_what_is_to_be_hidden_must_be_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"hidden must name folders, got '.*/none' \(Sandbox\)"):
        Sandbox(workers=1, hidden=[tmp_path / "none"])


@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
def test_bubblewrap_stands_in_for_landlock_and_namespaces(tmp_path):
    layers, _ = try_out(tmp_path, without=("landlock", "namespaces"))
    assert "bubblewrap" in layers


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """An interpreter, a module path and a folder for an ordinary user, whose home nobody else may enter."""
    if os.geteuid() != 0:
        pytest.skip("the other tests run as an ordinary user already")
    folder = Path("/tmp") / f"wmtp-ordinary-{os.getpid()}"  # pytest's own folders are closed to others
    folder.mkdir(mode=0o755)
    try:
        library = folder / "library" / "wmtp"
        shutil.copytree(PACKAGE / "sandbox", library / "sandbox")
        (library / "__init__.py").touch()
        home = folder / "home"
        home.mkdir()
        who = {"user": NOT_ROOT, "group": NOT_ROOT, "extra_groups": []}
        os.chown(home, NOT_ROOT, NOT_ROOT)
        home.chmod(stat.S_IRWXU)
        made = []
        for python in (sys.executable, "/usr/bin/python3"):
            check = [python, "-c", "import sys; assert sys.version_info >= (3, 11)"]
            command = [python, "-m", "venv", "--without-pip", str(home / "venv")]
            try:
                if all(subprocess.run(step, capture_output=True, **who).returncode == 0 for step in (check, command)):
                    made.append(home / "venv")
                    break
            except PermissionError:
                continue  # an interpreter under another private home
        if not made:
            pytest.skip("no Python 3.11 that an ordinary user could run")
        (site,) = made[0].glob("lib/python3*/site-packages")
        (site / "private_module.py").write_text("VALUE = 5\n")
        yield str(made[0] / "bin" / "python"), folder / "library", home
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("container", [False, True])
def test_an_ordinary_user_with_python_under_a_private_home(offered, ordinary, container):
    if container and "landlock" not in offered:
        pytest.skip("this kernel has no Landlock")
    python, path, home = ordinary
    imports = "import private_module\nassert private_module.VALUE == 5"
    layers, missing = try_out(home, user=NOT_ROOT, python=python, path=path, imports=imports, container=container)
    assert any(layer.startswith("landlock" if container else "namespaces user") for layer in [*layers, *missing])
    assert ("resident memory" in layers) == ("resident" in offered)


@pytest.mark.parametrize("without", [("seccomp",), ("rlimits",), tuple(sorted(FILES_APART))], ids=str)
def test_below_the_floor_the_sandbox_refuses(without):
    with pytest.raises(
        ValueError, match=rf"(?s)less than the sandbox's floor.*{without[-1]}: switched off.*allow_unsafe"
    ):
        Sandbox(workers=1, _without=without)
    with Sandbox(workers=1, _without=without, allow_unsafe=True) as sandbox:
        assert f"{without[-1]}: switched off" in sandbox.missing
        assert sandbox.judge([AssertionJob("f = abs", ("assert f(-1) == 1",))])[0].verdict == "passed"


def test_an_unknown_layer_is_refused():
    with pytest.raises(ValueError, match="_without must be of"):
        Sandbox(workers=1, _without=("magic",))


PROBES = ("landlock", "seccomp", "rlimits", "memory", "threads", "isolation")


@pytest.mark.parametrize("layer", PROBES)
def test_a_probe_notices_that_its_layer_does_not_hold(layer, tmp_path):
    """Run in a fresh interpreter without any protection, every probe must find fault."""
    (tmp_path / "outside").touch()
    code = f"""
    from wmtp.sandbox import probe
    layer, path = {layer!r}, {str(tmp_path / "outside")!r}
    checks = dict(landlock=lambda: probe._landlock(path, 6), seccomp=probe._seccomp)
    checks |= dict(rlimits=probe._rlimits, threads=probe._thread_limit)
    checks |= dict(memory=lambda: probe._resident_memory(probe.ResidentMemory()))
    if layer == "isolation":
        print(probe._isolation(path, "pid"))
    else:
        print(probe.try_out(probe.Confinement(None, None, False, 0, False), {str(tmp_path)!r}, checks[layer]))
    """
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip()


def judge(sandbox, program, test):
    return sandbox.judge([AssertionJob(textwrap.dedent(program), (test,))])[0]


@pytest.fixture(scope="module", params=["all layers", "without namespaces"])
def sandbox(request, offered):
    without = () if request.param == "all layers" else ("namespaces",)
    if without and "landlock" not in offered:
        pytest.skip("this kernel has no Landlock")
    with Sandbox(workers=1, _without=without) as box:
        yield box


def test_the_next_program_finds_an_empty_folder_whatever_was_left(sandbox):
    program = """
    import os
    def f(x):
        os.symlink("/", "root")
        for i in range(200):
            open(f"file{i}", "w").close()
        for i in range(1500):  # far deeper than the longest path
            os.mkdir("d" * 100)
            os.chdir("d" * 100)
        return x
    """
    for _ in range(2):
        assert judge(sandbox, program, "assert f(1) == 1").verdict == "passed"
        clean = "import os\ndef f(): return [os.listdir('.'), os.listdir(os.environ['TMPDIR'])]"
        assert judge(sandbox, clean, "assert f() == [[], []]").verdict == "passed"


def test_the_scratch_folder_is_bounded(sandbox):
    if "scratch folder of bounded size" not in sandbox.layers:
        pytest.skip("no tmpfs could be mounted: only single files are bounded")
    fill = """
    def f():
        total = 0
        try:
            for i in range(10**4):
                with open(str(i), "wb", buffering=0) as file:
                    total += file.write(bytes(1 << 20))
        except OSError:
            return total
    """
    assert judge(sandbox, fill, f"assert 1 << 20 <= f() <= {filesystem.SCRATCH_BYTES}").verdict == "passed"
    many = "def f():\n  try:\n    for i in range(10**5): open(str(i), 'w').close()\n  except OSError: return i"
    assert judge(sandbox, many, f"assert 1 <= f() <= {filesystem.SCRATCH_FILES}").verdict == "passed"


def test_a_single_file_is_bounded(sandbox):
    program = "def f():\n  with open('x', 'wb') as file: file.truncate(1 << 40)"
    outcome = judge(sandbox, program, "assert f() is None")
    assert outcome.verdict == "exception" and "too large" in outcome.detail


def test_threads_are_bounded(sandbox):
    if "thread limit" not in sandbox.layers:
        pytest.skip("RLIMIT_NPROC would count other processes here")
    program = """
    import threading
    threading.stack_size(1 << 16)
    def f(n):
        done = threading.Event()
        for i in range(n):
            threading.Thread(target=done.wait, daemon=True).start()
        done.set()
        return n
    """
    assert judge(sandbox, program, "assert f(60) == 60").verdict == "passed"
    assert judge(sandbox, program, "assert f(1000) == 1000").verdict == "exception"


def test_a_program_gets_four_descriptors_and_a_clean_environment(sandbox):
    os.environ["AWS_SECRET_ACCESS_KEY"] = "planted"
    program = """
    import fcntl, os
    def f():
        found = []
        for number in range(1024):
            try:
                fcntl.fcntl(number, fcntl.F_GETFD)
                found.append(number)
            except OSError:
                pass
        return found, sorted(os.environ)
    """
    try:
        with Sandbox(workers=1) as box:
            outcome = judge(box, program, "numbers, names = f()\nassert numbers == [0, 1, 2, 3] and not names, names")
    finally:
        del os.environ["AWS_SECRET_ACCESS_KEY"]
    assert "PYTHONHASHSEED" in outcome.detail and "AWS" not in outcome.detail


def test_programs_leave_no_descriptor_and_no_process(sandbox):
    def state():
        members = psutil.Process().children(recursive=True)
        return sorted((process.pid, process.num_fds()) for process in members), psutil.Process().num_fds()

    programs = ["f = abs", "def f(x): raise ValueError", "import os\ndef f(x): os._exit(1)", "def f(x) return"]
    judge(sandbox, programs[0], "assert f(-1) == 1")
    before = state()
    for program in programs * 5:
        judge(sandbox, program, "assert f(-1) == 1")
    assert state() == before


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Sandbox(workers=2) as box:
        assert judge(box, "f = abs", "assert f(-1) == 1").verdict == "passed"
        assert list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []


def test_removing_a_folder_follows_no_link_and_stops_at_no_depth(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(kept)
    (folder / "dangling").symlink_to("nowhere")
    start = os.open(folder, os.O_RDONLY)
    descriptor = os.dup(start)
    for _ in range(1200):
        os.mkdir("d" * 200, dir_fd=descriptor)
        deeper = os.open("d" * 200, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = deeper
    os.close(descriptor)
    os.close(start)
    (folder / "closed" / "inner").mkdir(parents=True)
    (folder / "closed").chmod(0)
    filesystem.remove_folder(folder)
    assert not folder.exists() and (kept / "file").exists()
    filesystem.remove_folder(folder)  # which is gone already


def test_solutions_are_hidden_where_the_package_lies_among_readable_folders(tmp_path):
    site = tmp_path / "site-packages"
    for name in ("numpy", "wmtp/data"):
        (site / name).mkdir(parents=True)
    rules = dict(filesystem.landlock_rules([str(site)], [str(site / "wmtp")], "/box"))
    assert rules[str(site / "numpy")] == filesystem.landlock.READ
    assert rules[str(site)] == filesystem.landlock.LIST
    assert not any(path.startswith(str(site / "wmtp")) for path in rules)


def decide(code, architecture, number, *args):
    """What a filter returns for one system call: a small interpreter of classic BPF."""
    data = {0: number, 4: architecture} | {16 + 8 * index: arg & 0xFFFFFFFF for index, arg in enumerate(args)}
    position = accumulator = 0
    while True:
        operation, if_true, if_false, k = code[position]
        position += 1
        if operation == 0x06:
            return k
        if operation == 0x20:
            accumulator = data.get(k, 0)
        elif operation == 0x54:
            accumulator &= k
        elif operation == 0x05:
            position += k
        else:
            holds = accumulator == k if operation == 0x15 else accumulator >= k
            position += if_true if holds else if_false


ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


@pytest.mark.parametrize("machine", syscalls.ARCHITECTURES)
def test_the_filter_decides_by_number_and_arguments(machine):
    table, architecture = syscalls.table(syscalls._PROGRAM, machine), syscalls.ARCHITECTURES[machine]
    code = seccomp.program(table, architecture, (435, 437))
    assert all(0 <= jump < 256 for _, *jumps, _ in code for jump in jumps)
    free = {name: number for name, number in table.items() if name not in seccomp._CONDITIONS}
    for name, number in free.items():
        assert decide(code, architecture, number) == ALLOW, name
        assert decide(code, architecture ^ 1, number) == KILL
        assert decide(code, architecture, number | 0x40000000) == KILL
    for number in set(range(1000)) - set(table.values()):
        assert decide(code, architecture, number) == (ENOSYS if number in (435, 437) else EPERM)
    me = seccomp.OWN_PID
    cases = {
        "clone": [((0x3D0F00,), ALLOW), ((17,), EPERM), ((0x3D0F00 | 0x10000000,), EPERM), ((0x4111,), EPERM)],
        "kill": [((me, 9), ALLOW), ((1, 9), EPERM), ((0, 9), EPERM), ((-1, 9), EPERM)],
        "tgkill": [((me, 5, 6), ALLOW), ((1, 1, 9), EPERM)],
        "prlimit64": [((0,), ALLOW), ((me,), ALLOW), ((1,), EPERM)],
        "socketpair": [((1, 1), ALLOW), ((1, 0x80801), ALLOW), ((1, 2), EPERM), ((2, 1), EPERM)],
        "prctl": [((15,), ALLOW), ((22, 2), EPERM), ((4, 1), EPERM), ((38, 1), EPERM)],
        "ioctl": [((0, 0x5401), ALLOW), ((0, 0x5412), EPERM), ((0, 0x8901), EPERM)],
        "fcntl": [((0, 3), ALLOW), ((0, 8), EPERM), ((0, 10), EPERM), ((0, 1024), EPERM)],
        "mmap": [((0, 0, 0, 0x22), ALLOW), ((0, 0, 0, 1), ALLOW), ((0, 0, 0, 0x21), EPERM), ((0, 0, 0, 0x23), EPERM)],
        "openat": [((0, 0, 0), ALLOW), ((0, 0, 0o1000), EPERM), ((0, 0, 0o1001), ALLOW), ((0, 0, 0o1102), ALLOW)],
    }
    assert set(cases) | {"open"} == set(seccomp._CONDITIONS)
    for name, decisions in cases.items():
        for args, expected in decisions:
            assert decide(code, architecture, table[name], *args) == expected, (name, args)


HEADERS = {"x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h")}
HEADERS["aarch64"] = ("/usr/include/asm-generic/unistd.h",)


@pytest.mark.parametrize("machine", HEADERS)
def test_system_call_numbers_are_those_of_the_kernel_headers(machine):
    header = next((Path(path) for path in HEADERS[machine] if os.path.exists(path)), None)
    if header is None:
        pytest.skip("the kernel's headers are not installed")
    defined = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
    numbers = {name: int(number) for name, number in defined}
    if machine == "aarch64":
        numbers["newfstatat"] = numbers["fstatat"]
    for name, number in (syscalls.table(syscalls._PROGRAM, machine) | syscalls.table(syscalls._SETUP, machine)).items():
        assert numbers.get(name, number) == number, name
    assert len(numbers) > 250


def test_limits_can_only_be_lowered():
    code = """
    import resource
    from wmtp.sandbox import confine
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 100))
    confine.lower(resource.RLIMIT_NOFILE, 1000)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (100, 100)
    confine.lower(resource.RLIMIT_NOFILE, 50)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (50, 50)
    """
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)


def test_address_space_is_measured():
    assert confine.address_space() > 10 << 20
