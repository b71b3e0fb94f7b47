"""Reading, writing, linking and filling, outside and inside the scratch folder.

@CANARY@ is a file outside that holds the number 914273; @OUTSIDE@ a folder outside with a file `kept`; @PROJECT@ the
project's root; files that an attack makes have names that begin with @MARK@.
"""

from attacks import FAULTS, QUICK, SECRET, Attack, Limits, with_syscalls

REFUSED = frozenset({"exception", "violation"})
DAMAGE = frozenset({"wrong_answer", "exception", "violation"})
BUSY = Limits(cpu_seconds=2.0, wall_seconds=10.0)


def _attack(name: str, says: str, body: str, tests=None, verdicts=REFUSED, answer: str = "5", limits=QUICK) -> Attack:
    """A program that does `body` and then answers: 5 is right, 6 wrong."""
    lines = "".join(f"    {line}\n" for line in body.strip("\n").splitlines())
    function = "def secret():\n" if tests is SECRET else "def solve(a, b):\n"
    program = (
        f'"""{says}"""\nimport os, shutil, stat, struct, sys, tempfile\n\n\n{function}{lines}    return {answer}\n'
    )
    program = with_syscalls(program) if "syscall(" in body or "libc" in body else program
    return Attack(name, program, verdicts=verdicts, limits=limits, **({"tests": tests} if tests else {}))


def _reading(name: str, says: str, body: str) -> Attack:
    return _attack(name, says, body, SECRET, frozenset({"exception", "violation", "wrong_answer"}), "int(content)")


def _damaging(name: str, says: str, body: str, limits=QUICK) -> Attack:
    """Tries each line by itself; all of them may be refused without an exception for the judge to see."""
    tries = "".join(f"try:\n    {line}\nexcept OSError:\n    pass\n" for line in body.strip().splitlines())
    return _attack(name, says, tries, None, DAMAGE, "6", limits)


ATTACKS = (
    _attack("read_passwd", "Reads the machine's list of users.", "open('/etc/passwd').read()[0]"),
    _reading("read_a_canary", "Reads a file outside by its path.", "content = open('@CANARY@').read()"),
    _reading("read_relative", "Reads it by way of `..`.", "content = open('../' * 40 + '@CANARY@'.lstrip('/')).read()"),
    _reading(
        "read_through_a_symlink",
        "Links to it from the scratch folder.",
        """
os.symlink('@CANARY@', 'link')
content = open('link').read()
""",
    ),
    _reading(
        "read_through_a_hard_link",
        "Gives it a second name in the scratch folder.",
        """
os.link('@CANARY@', 'link')
content = open('link').read()
""",
    ),
    _reading(
        "read_after_a_rename",
        "Moves it into the scratch folder.",
        """
os.rename('@CANARY@', 'mine')
content = open('mine').read()
""",
    ),
    _reading(
        "read_after_chdir",
        "Goes there first.",
        """
os.chdir(os.path.dirname('@CANARY@'))
content = open(os.path.basename('@CANARY@')).read()
""",
    ),
    _reading(
        "read_by_handle",
        "Opens it by its inode, past every path.",
        """
handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
mount = ctypes.c_int()
syscall("name_to_handle_at", -100, b"@CANARY@", handle, ctypes.byref(mount), 0)
here = os.open(".", os.O_RDONLY)
content = open(syscall("open_by_handle_at", here, handle, os.O_RDONLY)).read()
""",
    ),
    _reading(
        "read_by_descriptor",
        "Looks whether an open descriptor is a folder from which the file can be reached.",
        """
for descriptor in range(256):
    try:
        found = os.open("../" * 40 + "@CANARY@".lstrip("/"), os.O_RDONLY, dir_fd=descriptor)
        content = os.read(found, 100)
        break
    except OSError:
        pass
else:
    raise PermissionError
""",
    ),
    _attack("list_the_project", "Lists the project's folder.", "os.listdir('@PROJECT@').index('pyproject.toml')"),
    _attack("list_the_home", "Lists the home of the user who judges.", "os.listdir('@HOME@')"),
    _attack(
        "read_the_tests",
        "Searches the project for the files that hold the tests.",
        """
import pathlib
assert any(b'9142' in f.read_bytes() for f in pathlib.Path('@PROJECT@/tests').rglob('*.py'))
""",
        verdicts=REFUSED,
    ),
    _attack("read_the_history", "Reads the project's git folder.", "open('@PROJECT@/.git/HEAD').read()"),
    _attack(
        "open_the_sandbox_for_writing",
        "Opens the sandbox's own source to append to it.",
        "open('@PROJECT@/wmtp/sandbox/__init__.py', 'a').close()",
    ),
    _attack(
        "open_the_library_for_writing",
        "Opens the standard library's source to append to it, directly and by a hard link.",
        """
try:
    open(os.__file__, "a").close()
except OSError:
    os.link(os.__file__, "link.py")
    open("link.py", "a").close()
""",
    ),
    _damaging(
        "write_around",
        "Leaves files in every folder it can think of.",
        """
open("../@MARK@", "w").write("x")
open("../../@MARK@", "w").write("x")
open("/tmp/@MARK@", "w").write("x")
open("/var/tmp/@MARK@", "w").write("x")
open("/dev/shm/@MARK@", "w").write("x")
open("/run/@MARK@", "w").write("x")
open("/@MARK@", "w").write("x")
open("@OUTSIDE@/@MARK@", "w").write("x")
open("@PROJECT@/@MARK@", "w").write("x")
open(os.path.expanduser("~/@MARK@"), "w").write("x")
open(os.path.join("@HOME@", "@MARK@"), "w").write("x")
os.mkdir("@OUTSIDE@/@MARK@folder")
os.mkfifo("@OUTSIDE@/@MARK@fifo")
os.symlink("x", "@OUTSIDE@/@MARK@link")
""",
    ),
    _damaging(
        "overwrite_a_canary",
        "Overwrites, cuts, removes and replaces a file outside.",
        """
open("@CANARY@", "w").write("x")
open("@CANARY@", "a").write("x")
open("@CANARY@", "r+").write("x")
os.truncate("@CANARY@", 0)
os.unlink("@CANARY@")
os.rename("@CANARY@", "@CANARY@.moved")
open("mine", "w").write("x") and os.replace("mine", "@CANARY@")
shutil.rmtree("@OUTSIDE@", ignore_errors=True)
os.symlink("@CANARY@", "link") or open("link", "w").write("x")
""",
    ),
    _damaging(
        "change_a_canarys_mode",
        "Changes a file's mode, owner, times and attributes, none of which is an access to what it holds.",
        """
os.chmod("@CANARY@", 0)
os.chmod("@OUTSIDE@", 0o777)
os.chown("@CANARY@", 65534, 65534)
os.utime("@CANARY@", (0, 0))
os.setxattr("@CANARY@", "user.wmtp", b"x")
os.removexattr("@CANARY@", "user.kept")
os.utime("@OUTSIDE@", (0, 0))
""",
    ),
    _damaging(
        "change_modes_through_descriptors",
        "The same through descriptors that were opened for no access at all, and through its own folder's.",
        """
os.fchmod(os.open("@CANARY@", os.O_PATH), 0)
os.chmod(os.path.basename("@CANARY@"), 0, dir_fd=os.open(os.path.dirname("@CANARY@"), os.O_PATH))
os.symlink("@CANARY@", "link") or os.chmod("link", 0)
os.utime("@CANARY@", (0, 0), follow_symlinks=False)
os.chmod("..", 0)
""",
    ),
    _damaging(
        "links_left_for_the_cleaner",
        "Leaves links to outside in its folder, which whoever removes the folder must not follow.",
        """
os.symlink("@OUTSIDE@", "a")
os.symlink("@CANARY@", "b")
os.mkdir("c")
os.symlink("@OUTSIDE@", "c/d")
os.symlink("/", "e")
os.symlink("e", "f")
os.symlink("loop", "loop")
""",
    ),
    _damaging(
        "moved_scratch_folder",
        "Moves its folder away and puts a link to another in its place.",
        """
os.rename(os.getcwd(), os.getcwd() + "@MARK@")
os.symlink("@OUTSIDE@", os.getcwd())
os.rmdir(os.getcwd())
""",
    ),
    _damaging(
        "folders_without_rights",
        "Takes all rights from its own folders and files, its scratch folder too.",
        """
os.makedirs("a/b/c")
open("a/b/c/file", "w").write("x")
os.chmod("a/b/c/file", 0)
os.chmod("a/b/c", 0)
os.chmod("a/b", 0)
os.chmod("a", 0)
os.chmod(".", 0)
""",
    ),
    _damaging(
        "strange_names",
        "Files with names that are no UTF-8, hold line breaks, or are as long as allowed.",
        """
open(b"\\xff\\xfe", "w").close()
open("a\\nb\\r\\x1b[2J", "w").close()
open("x" * 255, "w").close()
open("-rf *", "w").close()
os.mkfifo("fifo")
os.mkdir(" ")
""",
    ),
    _attack(
        "deep_folders",
        "A path deeper than recursion and longer than any path may be.",
        """
for _ in range(1_200):
    try:
        os.mkdir("d" * 50)
        os.chdir("d" * 50)
    except OSError:
        break
""",
        verdicts=frozenset({"wrong_answer", "exception", "timeout"}),
        answer="6",
        limits=BUSY,
    ),
    _attack(
        "many_small_files",
        "As many empty files as it can make in its time.",
        """
made = 0
try:
    while True:
        open(f"f{made}", "w").close()
        made += 1
except OSError:
    pass
""",
        verdicts=frozenset({"wrong_answer", "exception", "timeout"}),
        answer="6",
    ),
    _attack(
        "fill_the_disk",
        "Reserves 2 GiB in files of 16 MiB.",
        """
for number in range(128):
    with open(f"f{number}", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 16 << 20)
""",
        verdicts=FAULTS,
        limits=BUSY,
    ),
    _attack(
        "one_huge_file",
        "Writes one file without end.",
        """
with open("f", "wb", buffering=0) as file:
    for _ in range(2048):
        if file.write(bytes(1 << 20)) != 1 << 20:
            raise OSError("full")
""",
        verdicts=FAULTS,
        limits=BUSY,
    ),
    _attack(
        "holes",
        "A file that is 2**60 bytes long and takes none, for whoever reads it whole.",
        """
with open('f', 'wb') as file:
    file.truncate(2**60)
""",
        verdicts=FAULTS,
        answer="6",
    ),
    _attack(
        "devices",
        "Opens devices that reach the memory, the disks or the terminal.",
        """
for name in "mem kmem port kmsg sda vda nvme0n1 tty kvm fuse net/tun".split():
    try:
        os.close(os.open(f"/dev/{name}", os.O_RDONLY))
        break
    except OSError:
        pass
else:
    raise PermissionError
""",
    ),
    _attack(
        "own_device",
        "Makes a device file of its own for the disk that it lives on.",
        """
os.mknod("disk", stat.S_IFBLK | 0o600, os.stat("/").st_dev)
os.read(os.open("disk", os.O_RDONLY), 512)
""",
    ),
    _attack("chroot", "Makes its folder the root, the first half of a known way out.", "os.chroot('.')"),
    _attack("mount", "Mounts a file system on its folder.", "syscall('mount', b'none', b'.', b'tmpfs', 0, 0)"),
    _attack("bind_mount", "Mounts the root into its folder.", "syscall('mount', b'/', b'.', 0, 4096, 0)"),
    _attack("open_tree", "Takes the root as a mount object.", "syscall('open_tree', -100, b'/', 1)"),
    _attack("fsopen", "Makes a file system from nothing.", "syscall('fsopen', b'tmpfs', 0)"),
    _attack("pivot_root", "Exchanges the root.", "syscall('pivot_root', b'.', b'.')"),
    _attack("unshare_user", "Becomes root in a user namespace.", "syscall('unshare', 0x10000000)"),
    _attack("unshare_mounts", "Gets mounts of its own.", "syscall('unshare', 0x00020000)"),
    _attack(
        "io_uring",
        "Opens the queue whose file accesses no filter of system calls sees.",
        "syscall('io_uring_setup', 8, bytes(120))",
    ),
)
