"""A pool for the corpus of attacks, in a place where everything that a program leaves behind shows."""

import contextlib
import ctypes
import os
import re
import socket
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from wmtp.sandbox import AssertionJob, Sandbox

ROOT = Path(__file__).resolve().parents[2]
MARK = f"wmtp_attack_{os.getpid()}_"  # begins the name of every file that an attack tries to leave
TOKEN = "AWS_SECRET_ACCESS_KEY"
NUMBER = "914273"
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37

# Answers with all that is not as a program must find it, whoever ran before it.
PROBE = """
import builtins, collections, decimal, gc, heapq, json, math, os, random, resource, signal, sys, threading, time


def deviations():
    found = {
        "files": os.listdir("."),
        "math": (math.pi, math.sqrt(16)) != (3.141592653589793, 4.0),
        "modules": [m.__name__ for m in (json, heapq, collections) if not hasattr(m, "__file__")],
        "json": json.dumps([1]) != "[1]",
        "builtins": [f for f in (len, print, isinstance, type) if f.__module__ != "builtins"],
        "decimal": decimal.getcontext().prec != 28,
        "path": [p for p in sys.path if "wmtp_attack" in p],
        "recursion": sys.getrecursionlimit() < 1000,
        "gc": not gc.isenabled(),
        "threads": threading.active_count() != 1,
        "clock": not 1.7e9 < time.time() < 1e10,
        "mask": os.umask(0o077) == 0o777,
        "environment": [n for n in os.environ if "wmtp" in os.environ[n] and "attack" in os.environ[n]],
        "signals": [s for s in (14, 15, 24) if signal.getsignal(s) is not signal.SIG_DFL],
        "nice": os.getpriority(os.PRIO_PROCESS, 0) - @NICE@,
        "processors": sorted(os.sched_getaffinity(0)) != @PROCESSORS@,
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 16,
    }
    return {name: value for name, value in found.items() if value}


def add(a, b):
    return a + b
"""


@dataclass
class Watch:
    """Places planted for the attacks, and what must stay as it is while they run."""

    base: Path
    sandbox: Sandbox = None
    listeners: list[socket.socket] = field(default_factory=list)

    def __post_init__(self):
        for name in ("cwd", "tmp", "home", "outside"):
            (self.base / name).mkdir()
        self.canary = self.base / "outside" / "canary"
        self.canary.write_text(NUMBER)
        (self.base / "outside" / "kept").write_text("kept")
        self.tcp = self._listen(socket.socket(), ("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.abstract = f"{MARK}{self.base.name}"
        self.udp = self._listen(socket.socket(type=socket.SOCK_DGRAM), ("127.0.0.1", self.port))
        self.path = self._listen(socket.socket(socket.AF_UNIX), str(self.base / "outside" / "socket"))
        self.name = self._listen(socket.socket(socket.AF_UNIX), f"\0{self.abstract}")
        self.datagram = self._listen(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), f"\0{self.abstract}.datagram")

    def _listen(self, server, address):
        server.bind(address)
        if server.type == socket.SOCK_STREAM:
            server.listen()
        server.setblocking(False)
        self.listeners.append(server)
        return server

    @property
    def places(self) -> dict[str, str]:
        """What stands for @NAME@ in a program."""
        return {
            "CANARY": str(self.canary),
            "OUTSIDE": str(self.base / "outside"),
            "HOME": str(self.base / "home"),
            "PROJECT": str(ROOT),
            "SOCKET": str(self.base / "outside" / "socket"),
            "ABSTRACT": self.abstract,
            "PORT": str(self.port),
            "MARK": MARK,
            "TOKEN": TOKEN,
            "NICE": str(os.nice(0)),
            "PROCESSORS": str(sorted(os.sched_getaffinity(0))),
        }

    def probe(self) -> AssertionJob:
        """An honest program that also looks for what an earlier one has changed."""
        program = PROBE
        for name, value in self.places.items():
            program = program.replace(f"@{name}@", value)
        return AssertionJob(program=program, tests=("assert deviations() == {}", "assert add(2, 3) == 5"))

    def processes(self) -> dict[int, tuple]:
        """Every process below this one, orphans included, with the settings that another could have changed."""
        found = {}
        for process in psutil.Process().children(recursive=True):
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = (
                        process.status() == psutil.STATUS_STOPPED,
                        process.nice(),
                        process.cpu_affinity(),
                    )
            except psutil.NoSuchProcess:
                continue
        return found

    def files(self) -> dict[str, object]:
        """Every file in the planted places, and every file with the attacks' mark where they try to leave one."""
        found = {}
        for path in [self.base, *sorted(self.base.rglob("*"))]:
            status = path.lstat()
            content = path.read_text() if path.is_file() and not path.is_relative_to(self.base / "tmp") else None
            times = (status.st_mtime_ns, status.st_ctime_ns) if path.is_relative_to(self.base / "outside") else None
            name = re.sub(r"-[^-/]{8}(?=/|$)", "-*", str(path))  # a judge or zygote that was replaced has a new folder
            found.setdefault(name, []).append((status.st_mode, status.st_uid, times, content))
        library = Path(os.__file__).parent
        site_packages = Path(psutil.__file__).parent.parent
        around = [ROOT, ROOT.parent, ROOT / "wmtp" / "sandbox" / "__pycache__", library, library / "__pycache__"]
        around += [site_packages, Path.home(), *map(Path, ("/", "/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run"))]
        for folder in around:
            for name in os.listdir(folder) if folder.is_dir() else ():
                if "wmtp_attack" in name or name in ("sitecustomize.py", "usercustomize.py"):
                    found[str(folder / name)] = "left behind"
        found["library"] = Path(os.__file__).stat().st_mtime_ns
        for kind in ("shm", "msg", "sem"):
            table = Path("/proc/sysvipc") / kind
            found[kind] = table.read_text().count(str(0x574D5450)) if table.exists() else 0
        return found

    def visitors(self) -> list[str]:
        """Who has connected or sent something to the planted listeners."""
        found = []
        for name in ("tcp", "udp", "path", "name", "datagram"):
            server = getattr(self, name)
            try:
                server.accept()[0].close() if server.type == socket.SOCK_STREAM else server.recv(10)
            except BlockingIOError:
                continue
            found.append(name)
        return found


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    """A pool of one worker, so that the next program meets the same processes, in the middle of planted places."""
    with plant(tmp_path_factory.mktemp("sandbox")) as watch:
        yield watch


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def weaker_watch(request, tmp_path_factory):
    """The same where a layer that not every machine has is switched off."""
    with plant(tmp_path_factory.mktemp("sandbox"), without=(request.param,)) as watch:
        if any(layer.startswith("mount+") or "namespaces" in layer for layer in watch.sandbox.layers) or (
            request.param == "namespaces"
        ):
            yield watch
        else:
            pytest.skip("without Landlock this machine has nothing that keeps programs from files")


@contextlib.contextmanager
def plant(base: Path, without: tuple[str, ...] = ()):
    """A `Watch` with its pool, this process's folder, environment and temporary folder being the planted ones."""
    before = {name: os.environ.get(name) for name in (TOKEN, "TMPDIR", "HOME", "WMTP_ATTACK_SECRET")}
    folder, chosen = os.getcwd(), tempfile.tempdir
    adopted = adopt_orphans(True)
    watch = Watch(base)
    os.environ[TOKEN] = os.environ["WMTP_ATTACK_SECRET"] = f"wmtp-{NUMBER}"
    os.environ["TMPDIR"], os.environ["HOME"] = str(base / "tmp"), str(base / "home")
    os.chdir(base / "cwd")
    tempfile.tempdir = None  # chosen anew, from TMPDIR
    try:
        with Sandbox(workers=1, _without=without) as watch.sandbox:
            yield watch
    finally:
        tempfile.tempdir = chosen
        os.chdir(folder)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        for server in watch.listeners:
            server.close()
        adopt_orphans(adopted)


def adopt_orphans(yes: bool) -> bool:
    """Become the parent of every descendant whose own parent has ended, so that none can hide; what was so far."""
    if sys.platform != "linux":
        return False
    libc, before = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0)
    return bool(before.value)
