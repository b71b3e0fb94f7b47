"""Processes without their start-up: forked from a server that has imported torch and the recipes once.

A fresh interpreter computes for more than ten seconds before a recipe's first line, a forked one not at all. A test of
how a recipe is launched (torchrun, `tune run`, plain python) needs the real thing instead.
"""

import multiprocessing
import os
import sys
import traceback
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
_IMPORTED = [
    "transformers.models.llama",
    "recipes.full_finetune_distributed_wmtp",
    "recipes.lora_wmtp",
    "recipes.critic_stage1",
    "recipes.eval_mbpp",
    "recipes.eval_heads",
    "recipes.score_reference",
    "recipes.score_rollouts",
    "recipes.sweep_wmtp",
    "warm",
]


def fork_server():
    """The context whose processes are forked from the server, which is started where there is none yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    # The project's recipes come before torchtune's package of that name; one thread, as torchrun would have it.
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    with mock.patch.dict(os.environ, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


@dataclass
class Processes:
    """Running processes of one world, by rank."""

    members: list
    log: Path
    store: object  # where they meet; lives as long as they do

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.members]

    def running(self) -> bool:
        return all(process.is_alive() for process in self.members)

    def join(self, timeout: float = 300, *, code: int = 0) -> None:
        """Wait for the end of all, with this exit code; when one has another, or at the time-out, end the others and
        say what was printed."""
        waiting = {process.sentinel: process for process in self.members}
        while waiting:
            ended = [waiting.pop(sentinel) for sentinel in wait(list(waiting), timeout)]
            if not ended or any(process.exitcode != code for process in ended):
                break
        for process in waiting.values():
            process.kill()
        for process in self.members:
            process.join()
        codes = [process.exitcode for process in self.members]
        assert codes == [code] * len(codes), f"exit codes {codes}: {self.log.read_text()[-3000:]}"


def start(function, *args, size: int = 1, log: Path) -> Processes:
    """Start function(*args) in so many processes, which are told their place in the world as torchrun does.

    Args:
        function: of a module's top level.
        size: number of processes.
        log: file for what they print.
    """
    context = fork_server()
    store = dist.TCPStore("localhost", 0, size, is_master=True, wait_for_workers=False)
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    world |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    members = []
    for rank in range(size):
        environment = {key: str(value) for key, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()}
        own = (function, args, {**os.environ, **environment}, str(log))
        members.append(context.Process(target=_enter, args=own, daemon=True))  # a failing test leaves none behind
        members[-1].start()
    return Processes(members, Path(log), store)


def start_launched(function, *args, size: int, log: Path) -> tuple[Processes, list[int]]:
    """The same through a launcher that can be killed, with workers in sessions of their own, as torchrun's are.

    Returns:
        The launcher's process, and the workers' pids.
    """
    context = fork_server()
    pids, told = context.Pipe(duplex=False)
    launcher = context.Process(target=_launch, args=(function, args, dict(os.environ), size, str(log), told))
    launcher.start()
    told.close()  # or its end, before it has told them, is no end of the pipe
    return Processes([launcher], Path(log), None), pids.recv()


def _launch(function, args, environment, size, log, told):
    store = dist.TCPStore("localhost", 0, size, is_master=True, wait_for_workers=False)
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    world |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_RUN_ID": "test"}
    pids = []
    for rank in range(size):
        own = {**environment, **{key: str(v) for key, v in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()}}
        pids.append(os.fork())
        if pids[-1] == 0:
            os.setsid()
            try:
                _enter(function, args, own, log)
            except SystemExit as end:
                os._exit(end.code or 0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
    told.send(pids)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))


def run_recipe_file(name: str, config: str) -> None:
    """What `python recipes/{name}.py --config {config}` does."""
    sys.argv = [f"recipes/{name}.py", "--config", config]
    sys.exit(sys.modules[f"recipes.{name}"].main())  # imported by the server, or this fails


def _enter(function, args, environment, log):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    try:
        function(*args)
    except (Exception, KeyboardInterrupt):  # as the interpreter ends a script; multiprocessing prints its own way
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def forked(work, *args) -> tuple[int, str]:
    """Run work(*args) in a process forked from this one, which ends as the interpreter ends a script.

    Returns:
        Its exit status and what it wrote on stderr.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.dup2(writing, 2)
        os.close(writing)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, closefd=False)  # not what pytest captures
        sys.excepthook = sys.__excepthook__  # another test may have ended a recipe here, whose hook stays
        try:
            work(*args)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(99)  # which no hook of ours gives
    os.close(writing)
    with open(reading) as told:
        said = told.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said
