"""New processes, by every door. A program answers rightly if it got one; each such process ends by itself."""

from attacks import DIED, QUICK, Attack, with_syscalls

REFUSED = DIED

CHILD = "        time.sleep(20)\n        os._exit(0)\n"


def _attack(name: str, says: str, body: str, verdicts=REFUSED, header: str = "") -> Attack:
    lines = "".join(f"    {line}\n" for line in body.strip("\n").splitlines())
    program = f'"""{says}"""\nimport os, struct, time\n{header}\n\ndef solve(a, b):\n' + lines + "    return 5\n"
    return Attack(name, with_syscalls(program) if "syscall(" in body else program, verdicts=verdicts, limits=QUICK)


def _by_system_call(name: str, says: str, call: str) -> Attack:
    return _attack(name, says, f"if {call} == 0:\n    time.sleep(20)\n    os._exit(0)")


def _machine_code(name: str, says: str, hexadecimal: str) -> Attack:
    """Runs x86-64 code that returns a system call's result, and answers 5 if that is no error."""
    return _attack(
        name,
        says,
        f"""
if os.uname().machine != "x86_64":
    raise OSError("for another processor")
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("{hexadecimal}"))
code = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
result = code()
if result == 0:
    time.sleep(20)
    os._exit(0)
if result < 0:
    raise OSError(-result, "refused")
""",
        REFUSED,
        "import ctypes, mmap",
    )


ATTACKS = (
    _attack("fork", "Forks; the child stays for a while.", "if os.fork() == 0:\n" + CHILD.replace("        ", "    ")),
    _attack(
        "fork_bomb",
        "Forks in a tree, to a bounded depth.",
        "forked = 0\nfor _ in range(7):\n    try:\n        pid = os.fork()\n    except OSError:\n        continue\n"
        "    forked += 1\nif not forked:\n    raise PermissionError\nif pid == 0:\n"
        + CHILD.replace("        ", "    "),
    ),
    _attack(
        "daemon",
        "Forks twice and starts a session, to live on as nobody's child.",
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n" + CHILD + "    os._exit(0)",
    ),
    _by_system_call("fork_by_system_call", "Forks without the C library.", "syscall('fork')"),
    _by_system_call("vfork", "Borrows the parent's memory for a child.", "syscall('vfork')"),
    _by_system_call("clone", "The call below fork, asking for SIGCHLD.", "syscall('clone', 17, 0, 0, 0, 0)"),
    _by_system_call("clone_with_no_signal", "The same with flags 0.", "syscall('clone', 0, 0, 0, 0, 0)"),
    _by_system_call("clone_parent", "A child that is the parent's child.", "syscall('clone', 0x8000 | 17, 0, 0, 0, 0)"),
    _by_system_call(
        "clone_high_bits", "Hides the flags' meaning in bits above 32.", "syscall('clone', (1 << 40) | 17, 0, 0, 0, 0)"
    ),
    _by_system_call(
        "clone_new_user",
        "A child in namespaces of its own.",
        "syscall('clone', 0x10000000 | 0x20000000 | 17, 0, 0, 0, 0)",
    ),
    _by_system_call(
        "clone3",
        "The newest call, whose flags no filter can see.",
        "syscall('clone3', struct.pack('11Q', 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88)",
    ),
    _machine_code("fork_in_32_bit_mode", "Forks through the 32-bit system call gate.", "b802000000cd80c3"),
    _machine_code("execve_in_32_bit_mode", "Asks the same gate for a process id, 20.", "b814000000cd80c3"),
    _machine_code("fork_in_x32_mode", "Forks by the x32 number of the call.", "b8390000400f05c3"),
    _attack("subprocess", "Runs /bin/true.", "subprocess.run(['/bin/true'], check=True)", REFUSED, "import subprocess"),
    _attack(
        "subprocess_of_python",
        "Starts another interpreter.",
        "subprocess.run([sys.executable, '-c', ''], check=True)",
        REFUSED,
        "import subprocess, sys",
    ),
    _attack("system", "Asks the shell.", "if os.system('true') != 0: raise PermissionError"),
    _attack(
        "system_of_c",
        "Asks the shell through the C library.",
        "if ctypes.CDLL(None).system(b'true') != 0: raise PermissionError",
        REFUSED,
        "import ctypes",
    ),
    _attack(
        "fork_exec",
        "Calls what subprocess is made of.",
        """
reader, writer = os.pipe()
arguments = [["true"], [b"/bin/true"], True, (), None, None, -1, -1, -1, -1, -1, -1, reader, writer, False, False]
_posixsubprocess.fork_exec(*arguments, -1, None, None, None, -1, None, True)
""",
        REFUSED,
        "import _posixsubprocess",
    ),
    _attack("popen", "Reads the output of a shell.", "if os.popen('echo 5').read() != '5\\n': raise PermissionError"),
    _attack(
        "posix_spawn", "Starts a program without fork.", "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)"
    ),
    _attack(
        "pty_fork",
        "Forks with a terminal.",
        """
pid, _ = pty.fork()
if pid == 0:
    os._exit(0)
os.waitpid(pid, 0)
""",
        REFUSED,
        "import pty",
    ),
    _attack(
        "multiprocessing",
        "Computes in a pool of processes.",
        """
with multiprocessing.get_context('fork').Pool(1) as pool:
    pool.map(abs, [1])
""",
        REFUSED,
        "import multiprocessing",
    ),
    _attack(
        "process_pool",
        "Computes in concurrent.futures' processes.",
        """
with concurrent.futures.ProcessPoolExecutor(1) as pool:
    pool.submit(abs, -1).result()
""",
        REFUSED,
        "import concurrent.futures",
    ),
    _attack("exec_true", "Becomes /bin/true, which ends with status 0.", "os.execv('/bin/true', ['true'])"),
    _attack(
        "exec_python",
        "Becomes a fresh interpreter, free of whatever was patched in this one.",
        "os.execv(sys.executable, [sys.executable, '-c', 'pass'])",
        REFUSED,
        "import sys",
    ),
    _attack(
        "exec_from_memory",
        "Becomes a program that exists in memory only.",
        """
descriptor = syscall("memfd_create", b"x", 0)
os.write(descriptor, b"#!/bin/true\\n")
syscall("execveat", descriptor, b"", 0, 0, 0x1000)
""",
    ),
    _attack(
        "exec_from_the_scratch_folder",
        "Writes a script to its own folder and becomes it.",
        r"""
with open('run', 'w') as file:
    file.write('#!/bin/true\n')
os.chmod('run', 0o755)
os.execv('./run', ['run'])
""",
    ),
)
