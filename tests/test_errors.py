"""How an error ends a process: what is on the screen last, what is kept, and where a debugger stops."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import forked
from torch.distributed.elastic.multiprocessing.api import SignalException

from wmtp.errors import UserError, clear_errors, disk_fault, ending, is_traceback, keep_tracebacks
from wmtp.training.launcher import _hook, last_words

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import os, sys, time
from pathlib import Path

from wmtp.errors import UserError, clear_errors, ending, keep_tracebacks
from wmtp.files import file_sha256, sync
{imports}

OUTPUT_DIR = Path({output_dir!r})

def work():
    {work}

@clear_errors()
{decorator}
def main():
    OUTPUT_DIR.mkdir(exist_ok=True)
    (OUTPUT_DIR / "config.yaml").touch()  # the run has begun
    keep_tracebacks(OUTPUT_DIR, resumes=True)
    with ending(lambda status: print("ended as", status, flush=True)):
        work()

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(tmp_path):
    """The command that runs a recipe which does `work`."""

    def write(work, stops=False):
        more = (
            ("from wmtp.training.stopping import stopping", "@stopping()")
            if stops
            else ("", "# not of those that stop in order")
        )
        parts = {"output_dir": str(tmp_path / "run"), "work": work, "imports": more[0], "decorator": more[1]}
        (tmp_path / "recipe.py").write_text(SCRIPT.format(**parts))
        return [sys.executable, str(tmp_path / "recipe.py")]

    return write


@pytest.fixture
def run(script, tmp_path):
    def run(work, *, options=(), environment=None, **kwargs):
        python, file = script(work)
        variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WMTP_TRACEBACK")}
        variables |= {"PYTHONPATH": str(ROOT), **(environment or {})}
        command = [python, *options, file]
        return subprocess.run(
            command, capture_output=True, text=True, env=variables, cwd=tmp_path, timeout=120, **kwargs
        )

    return run


def test_an_error_for_the_user_is_one_line_that_names_its_traceback(run, tmp_path):
    line = "rows.jsonl:3: field 'x' is missing; add it"
    secret = {"MY_TOKEN": "a-secret-value"}
    done = run(f"raise UserError({line!r} + os.environ['MY_TOKEN'])", environment=secret)
    kept = tmp_path / "run" / "error_rank0.txt"
    assert done.returncode == 1
    assert done.stdout == "ended as FAILED\n"
    assert done.stderr == f"error: {line}*** (traceback: {kept})\n"
    assert "in work\n" in kept.read_text() and line in kept.read_text()
    assert "a-secret-value" not in kept.read_text()
    shown = run(f"raise UserError({line!r})", environment={"WMTP_TRACEBACK": "1"})
    assert "in work\n" in shown.stderr and shown.stderr.endswith(f"UserError: {line}\n")


@pytest.mark.parametrize(
    ("work", "last"),
    [
        ("raise ValueError('shapes [2, 3] and [3]')", "ValueError: shapes [2, 3] and [3]"),
        ("raise OSError('no answer')", "OSError: no answer"),
        ("{}['policy_ce']", "KeyError: 'policy_ce'"),
        ("open('mine.json')", "FileNotFoundError: [Errno 2] No such file or directory: 'mine.json'"),
    ],
)
def test_an_error_of_code_keeps_its_traceback_on_the_screen_and_in_output_dir(run, tmp_path, work, last):
    done = run(work)
    kept = tmp_path / "run" / "error_rank0.txt"
    assert done.returncode == 1
    assert "in work\n" in done.stderr and str(kept) in done.stderr
    assert done.stderr.endswith(f"{last}\n")
    assert kept.read_text().endswith(f"{last}\n")
    assert is_traceback(kept)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("file_sha256(Path('no/such/file'))", "no/such/file: No such file or directory"),
        ("file_sha256(OUTPUT_DIR / 'config.yaml' / 'x')", "run/config.yaml/x: Not a directory"),
        ("file = open('/dev/full', 'w'); file.write('x'); file.flush()", ": no space left on the disk ("),
        ("raise OSError(30, 'ro', '/data/x')", "/data/x: the file system is read-only ("),
        (
            "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. On')",
            "CUDA out of memory. Tried to allocate 2.00 GiB; recipes/plan_memory.py, given its config, tells",
        ),
        ("import torch; torch.empty(2**50)", "you tried to allocate 4503599627370496 bytes; recipes/plan_memory.py, "),
    ],
)
def test_what_the_machine_refuses_is_one_line(run, tmp_path, work, said):
    done = run(work)
    assert done.returncode == 1
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert str(tmp_path / "run" / "error_rank0.txt") in done.stderr
    if "MB free" in done.stderr:
        assert f"MB free); make room, then resume=true goes on from what is complete in {tmp_path}/run" in done.stderr


def test_a_clean_up_that_fails_is_said_and_does_not_hide_the_error(run):
    done = run("globals()['print'] = lambda *_, **__: {}['gone']; raise UserError('why the run failed')")
    first, second = done.stderr.splitlines()
    assert first == "while the run was ended: KeyError: 'gone'"
    assert second.startswith("error: why the run failed (")


@clear_errors()
def fail_in(folder, error, *, screen_is_gone=False):
    keep_tracebacks(folder, resumes=True)
    if screen_is_gone:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 2)
    with ending(lambda status: os.write(2, b"cleaned up\n") if not screen_is_gone else None):
        raise error


class Unspeakable(Exception):
    def __str__(self):
        return {}["text"]


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        (errno.EIO, "the disk or the network file system does not answer"),
        (errno.ESTALE, "the network file system has lost the file"),
        (errno.ENOTCONN, "the file system is no longer connected"),
    ],
)
def test_a_disk_that_does_not_answer_ends_the_process_too_with_one_line(tmp_path, number, fault):
    """Path.exists raises there; a name that is too long is what raises it on a healthy disk."""
    folder = tmp_path / ("x" * 300)
    with pytest.raises(OSError):
        folder.exists()
    status, said = forked(fail_in, folder, OSError(number, "said so", str(folder / "shard")))
    assert status == 1 and said.count("\n") == 2
    assert said.startswith(f"cleaned up\nerror: {folder}/shard: {fault} (")
    assert disk_fault(OSError(errno.ENOTCONN, "of a socket")) is None


def test_the_process_ends_whatever_goes_wrong_in_telling_why(tmp_path):
    def without_a_screen():
        fail_in(tmp_path, UserError("unheard"), screen_is_gone=True)

    assert forked(without_a_screen)[0] == 1
    status, said = forked(fail_in, tmp_path, Unspeakable())
    assert status == 1 and "raise error\n" in said and said.endswith("Unspeakable: <exception str() failed>\n")


def test_a_debugger_stops_where_an_error_was_raised(run):
    done = run(
        "value = 41; raise UserError('stop here')", options=["-m", "pdb", "-c", "continue"], input="p value+1\nq\n"
    )
    assert "Uncaught exception. Entering post mortem debugging" in done.stdout
    assert "(Pdb) 42" in done.stdout
    stopped = run("value = 41; breakpoint(); value", input="p value+1\nc\n")
    assert "42" in stopped.stdout and stopped.returncode == 0


@pytest.mark.parametrize(
    ("work", "options", "status", "said"),
    [
        ("value = 41; breakpoint(); value", (), 1, "stopped in the debugger\n"),
        ("value = 41", ("-m", "pdb", "-c", "b work", "-c", "continue"), 0, ""),
    ],
)
def test_leaving_the_debugger_ends_the_run_as_killed_and_is_no_error(run, tmp_path, work, options, status, said):
    done = run(work, options=options, input="p OUTPUT_DIR.name\nq\n")
    assert "(Pdb) 'run'\n" in done.stdout and "ended as KILLED\n" in done.stdout
    assert (done.returncode, done.stderr) == (status, said)
    assert not (tmp_path / "run" / "error_rank0.txt").exists()


@pytest.mark.parametrize(
    ("stops", "status", "line"),
    [
        (True, 75, "stopped by SIGINT; to go on from what is saved: the same command with resume=auto"),
        (False, 130, "stopped by Ctrl-C"),
    ],
)
def test_ctrl_c_ends_the_run_as_killed_with_one_line(script, stops, status, line):
    # In short sleeps: a signal that comes between Python's check and the kernel's sleep does not wake it.
    command = script("print('at work', flush=True); [time.sleep(0.1) for _ in range(1000)]", stops)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=60)
    assert process.returncode == status
    assert said == "ended as KILLED\n"
    assert told == f"{line}\n"


def test_one_rank_of_a_node_speaks_and_answers_the_launcher(script, tmp_path):
    """As torchrun starts them; rank 1, which fails first, waits for rank 0, which has the same error."""
    processes, command = [], script("raise UserError('both')")
    for rank in (1, 0):
        folder = tmp_path / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        place = {"RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(folder / "error.json"), "PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | place))
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert sum(bool(line) for line in said) == 1
    assert [process.returncode for process in processes] == [1, 1]
    answers = [json.loads((tmp_path / "attempt_0" / rank / "error.json").read_text()) for rank in "10"]
    assert sorted(answer["wmtp"] + "\n" * bool(answer["wmtp"]) for answer in answers) == sorted(said)
    assert all(answer["message"]["message"] == answer["wmtp"] for answer in answers)


def failure(exitcode, told=None, timestamp=0):
    data = {} if told is None else {"wmtp": told}
    return SimpleNamespace(exitcode=exitcode, error_file_data=data, timestamp=timestamp)


def test_the_launcher_s_last_line_is_the_first_error():
    ended = failure(-signal.SIGTERM)
    assert last_words({0: ended, 1: failure(1, "error [rank 1]: x")}) == (["error [rank 1]: x"], 1)
    assert last_words({0: failure(1, "later", 9), 1: failure(75, "first", 8), 2: failure(1, "")}) == (
        ["later", "first"],
        75,
    )
    stuck = {0: failure(-signal.SIGKILL), 1: failure(1, "error [rank 1]: x")}
    assert last_words(stuck) == (["rank 0 was killed (SIGKILL)", "error [rank 1]: x"], 1)
    stopped = failure(75, "stopped by SIGTERM; to go on from what is saved: ...")
    assert last_words({0: failure(-signal.SIGKILL), 1: stopped}) == (
        ["stopped by SIGTERM; to go on from what is saved: ...", "rank 0 was killed (SIGKILL)"],
        1,  # not 75: a loop that restarts what was stopped would run out of memory for ever
    )
    assert last_words({0: failure(-signal.SIGSEGV), 1: failure(1, "consequence")}) is None  # torch tells all it knows
    assert last_words({0: failure(2), 1: ended}) is None  # no recipe of ours


def end_launch(*statuses):
    """The launcher, which a signal ends while its workers have these exit statuses."""

    class Agent:
        _pcontext = SimpleNamespace(
            subprocess_handlers={n: SimpleNamespace(proc=SimpleNamespace(returncode=s)) for n, s in enumerate(statuses)}
        )

        def run(self):
            raise SignalException("Process got signal: 15", signal.SIGTERM)

    sys.excepthook = _hook(sys.excepthook)
    Agent().run()


def test_a_signal_to_a_launch_without_recipes_is_told_as_torch_tells_it():
    assert forked(end_launch, 75, 75) == (75, "")
    assert forked(end_launch, 75, 1) == (143, "")
    assert forked(end_launch, 143) == (143, "")  # of a recipe that cannot go on
    status, said = forked(end_launch, -signal.SIGTERM, 0)
    assert status == 99 and "SignalException: Process got signal: 15" in said


def test_a_full_disk_is_known_in_the_words_of_every_writer(tmp_path):
    import sqlite3

    import torch
    from safetensors.torch import save_file

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    found = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        for write in (
            lambda: torch.save(torch.zeros(10**5), tmp_path / "a.pt"),
            lambda: save_file({"a": torch.zeros(10**5)}, tmp_path / "a.safetensors"),
            lambda: (tmp_path / "a.txt").write_bytes(b"x" * 10**6),
        ):
            with pytest.raises(Exception) as error:
                write()
            found.append(disk_fault(error.value, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert all(fault.startswith(f"{tmp_path}: ") and fault.endswith(" MB free)") for fault in found), found
    with sqlite3.connect(":memory:") as store:
        store.execute("pragma max_page_count = 2")
        with pytest.raises(sqlite3.OperationalError) as full:
            store.execute("create table t as select zeroblob(100000) as x")
    assert "no space left on the disk" in disk_fault(full.value, tmp_path)
    assert disk_fault(ValueError("shapes"), tmp_path) is None


def test_other_packages_start_in_silence_and_their_warnings_are_heard():
    """Told by logger and level: MLflow's tables and torchao's kernels, and the launcher's default of one thread."""
    code = """
import logging
import wmtp, wmtp.training.launcher
import mlflow.utils.logging_utils  # sets its loggers' levels
wmtp.training.launcher.prepare()
logging.getLogger("torchao").warning("Skipping import of cpp extensions")
logging.getLogger("torchao").error("heard 1")
logging.getLogger("mlflow.store.db.utils").info("Updating database tables")
logging.getLogger("mlflow.store.db.utils").warning("heard 2")
launcher = logging.getLogger("torch.distributed.run")
launcher.warning("\\n****\\nSetting OMP_NUM_THREADS environment variable for each process to be %s", 1)
launcher.warning("heard 3")
"""
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=variables)
    said = done.stderr.splitlines()
    assert [line[-7:] for line in said] == ["heard 1", "heard 2", "heard 3"]
