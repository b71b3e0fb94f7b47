"""What /proc and the environment tell, and kernel interfaces that no contest program needs.

@TOKEN@ is the name of a variable that holds a secret, `wmtp-914273`, in the environment of the process that judges.
"""

from attacks import SECRET, Attack, with_syscalls

REFUSED = frozenset({"exception", "violation"})
FAILED = REFUSED | {"wrong_answer"}

# Finds the number in an environment block; the name is put together so that the program does not find itself.
FIND = """
import re

PATTERN = ("wmtp" + "-").encode() + rb"(\\d{6})"


def number_in(content):
    found = re.search(PATTERN, content)
    return int(found[1]) if found else None
"""


def _reading(name: str, says: str, body: str, verdicts=FAILED) -> Attack:
    lines = "".join(f"    {line}\n" for line in body.strip("\n").splitlines())
    program = f'"""{says}"""\n{FIND}\nimport os\n\n\ndef secret():\n{lines}'
    return Attack(name, with_syscalls(program) if "libc" in body or "parent()" in body else program, SECRET, verdicts)


def _refused(name: str, says: str, body: str, verdicts=REFUSED) -> Attack:
    lines = "".join(f"    {line}\n" for line in body.strip("\n").splitlines())
    program = f'"""{says}"""\nimport os, struct\n\n\ndef solve(a, b):\n{lines}    return 5\n'
    return Attack(name, with_syscalls(program), verdicts=verdicts)


ATTACKS = (
    _reading(
        "environment",
        "Looks for a secret in its environment.",
        "return number_in(repr(dict(os.environ)).encode()) or number_in(os.environb.get(b'@TOKEN@', b''))",
        frozenset({"wrong_answer"}),
    ),
    _reading(
        "environment_of_c",
        "Looks for it in the C library's own list, which os.environ does not follow.",
        """
libc.getenv.restype = ctypes.c_char_p
block = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, "environ")
index, texts = 0, [libc.getenv(b"@TOKEN@") or b""]
while block and block[index]:
    texts.append(block[index])
    index += 1
return number_in(b" ".join(texts))
""",
    ),
    _reading(
        "environment_on_the_stack",
        "Looks for it at the top of the stack, where the kernel put it when the process was started.",
        """
reader, writer = os.pipe()
address = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "__libc_stack_end").value & -4096
content = b""
for page in range(address, address + (2 << 20), 4096):
    if libc.write(writer, ctypes.c_void_p(page), ctypes.c_size_t(4096)) <= 0:
        break
    content += os.read(reader, 4096)
return number_in(content)
""",
    ),
    _reading(
        "proc_environ", "Reads its environment from /proc.", "return number_in(open('/proc/self/environ', 'rb').read())"
    ),
    _reading(
        "proc_environ_of_all",
        "Reads the environment of every process.",
        """
for pid in os.listdir("/proc"):
    try:
        number = number_in(open(f"/proc/{pid}/environ", "rb").read())
    except OSError:
        continue
    if number:
        return number
raise PermissionError
""",
    ),
    _reading(
        "proc_memory_of_the_parent",
        "Reads the parent's memory through /proc.",
        "return number_in(open(f'/proc/{parent()}/mem', 'rb').read(1))",
    ),
    _refused("proc_memory", "Opens its own memory as a file, for writing.", "open('/proc/self/mem', 'r+b').close()"),
    _refused("proc_maps", "Reads where its libraries lie.", "open('/proc/self/maps').read()"),
    _refused("proc_descriptors", "Lists and follows its open descriptors.", "os.listdir('/proc/self/fd')"),
    _refused("proc_root", "Leaves its folder through /proc.", "os.listdir('/proc/1/root/')"),
    _refused("proc_command_lines", "Reads what else is running.", "open(f'/proc/{os.getppid()}/cmdline').read()"),
    _refused(
        "proc_settings",
        "Opens a setting of the kernel for writing.",
        "os.open('/proc/sys/kernel/core_pattern', os.O_WRONLY)",
    ),
    _refused(
        "control_groups", "Opens its control group for writing.", "os.open('/sys/fs/cgroup/cgroup.procs', os.O_WRONLY)"
    ),
    _refused(
        "own_oom_score",
        "Makes others be killed first when memory ends.",
        "open('/proc/self/oom_score_adj', 'w').write('-999')",
    ),
    _refused(
        "kernel_log",
        "Reads the kernel's log.",
        "syscall('syslog', 3, bytearray(100) and ctypes.create_string_buffer(100), 100)",
    ),
    _refused(
        "host_name",
        "Sets the machine's name to what it is.",
        """
name = os.uname().nodename.encode()
syscall('sethostname', name, len(name))
""",
    ),
    _refused(
        "keyring", "Stores something in the user's keyring.", "syscall('add_key', b'user', b'@MARK@', b'x', 1, -4)"
    ),
    _refused("keyring_search", "Asks for the id of the session's keyring.", "syscall('keyctl', 0, -3, 1)"),
    _refused(
        "bpf",
        "Asks the kernel to hold a map of a BPF program.",
        "syscall('bpf', 0, struct.pack('IIIIII', 2, 4, 4, 1, 0, 0), 24)",
    ),
    _refused(
        "perf_events",
        "Counts the machine's events.",
        "syscall('perf_event_open', struct.pack('IIQ', 1, 112, 0) + bytes(96), 0, -1, -1, 0)",
    ),
    _refused("userfaultfd", "Handles its own page faults.", "syscall('userfaultfd', 1)"),
    _refused("user_id", "Becomes another user.", "os.setresuid(12345, 12345, 12345)"),
    _refused(
        "group_id",
        "Drops a group, to be let into what denies it.",
        """
os.setgroups([])
os.setresgid(12345, 12345, 12345)
""",
    ),
    _refused(
        "listener_filter",
        "Installs a filter of its own that hands its system calls to a listener.",
        """
program = struct.pack('HBBI', 6, 0, 0, 0x7FFF0000)
code = ctypes.create_string_buffer(program)
syscall('seccomp', 1, 8, struct.pack('HxxxxxxQ', 1, ctypes.addressof(code)))
""",
    ),
    _refused(
        "namespaces", "Joins the namespace of process 1.", "syscall('setns', syscall('pidfd_open', 1, 0), 0x20000000)"
    ),
)
