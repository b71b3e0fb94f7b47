"""The process of one run of a sweep: `tune run`, or plain Python for one process, with its output in a file."""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from wmtp.errors import Stopped

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_LAUNCHER = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_\w+|TORCHELASTIC_\w+|OMP_NUM_THREADS")
_KILLED = re.compile(r"rank \d+ was killed \(SIGKILL\)")
_BUSY = "is being written by"


def command(recipe: str, arguments: Sequence[str], processes: int) -> list[str]:
    """Returns what starts a recipe: in one process plain Python, which spares the launcher's seconds."""
    start = ["-m", "torchtune._cli.tune", "run", "--nproc_per_node", str(processes)] if processes > 1 else []
    return [sys.executable, *start, recipe, *arguments]


def shown(recipe: str, arguments: Sequence[str], processes: int) -> str:
    """Returns the same for people."""
    return shlex.join(["tune", "run", "--nproc_per_node", str(processes), recipe, *arguments])


class Process:
    """A started run, whose end is asked for with :meth:`poll`. It ends with this process, also if that is killed.

    Args:
        log: file that its output is added to.
        environment: variables beside those of this process.
    """

    def __init__(self, argv: list[str], log: Path, environment: dict[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in os.environ.items() if not _LAUNCHER.fullmatch(key)}
        self._log, parent = log, os.getpid()
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(argv)}\n".encode())
            self._begins = file.tell()

            def end_with_parent() -> None:
                _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # it saves a checkpoint
                if os.getppid() != parent:
                    os._exit(Stopped.exit_status)

            # A session of its own: Ctrl-C reaches this process alone, which passes it on.
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env={**kept, **environment},
                start_new_session=True, preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip

    def poll(self) -> int | None:
        """Returns the exit status, None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Asks it to save and end."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it and what it has started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def interrupted(self) -> bool:
        """Returns whether an ended one was stopped or killed rather than failed: it may go on from its checkpoint."""
        status = self._process.returncode
        signals = {Stopped.exit_status, 128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGKILL}
        return status < 0 or status in signals or _KILLED.fullmatch(self._last_line()) is not None

    def waits_for_folder(self) -> bool:
        """Returns whether it failed because another process, of a worker taken for dead, still writes its folder."""
        return _BUSY in self.error()

    def error(self) -> str:
        """Returns its last line that begins with ``error``; else the signal that ended it, and its last one."""
        lines = self._lines()
        found = [line for line in lines if re.match(r"error( \[rank \d+\])?: ", line)]
        if found:
            return found[-1].partition(": ")[2]
        status = self._process.returncode
        ended_by = f"ended by {signal.Signals(-status).name}; the last line was: " if status < 0 else ""
        return f"{ended_by}{self._last_line()}"

    def _last_line(self) -> str:
        said = (line for line in reversed(self._lines()) if line.strip())
        return next(said, f"exit status {self._process.returncode}, and nothing was printed")

    def _lines(self) -> list[str]:
        with self._log.open("rb") as file:
            file.seek(max(self._begins, self._log.stat().st_size - 65536))
            return file.read().decode(errors="replace").splitlines()
