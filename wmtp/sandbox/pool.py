"""The sandbox as callers see it: a pool of judge processes, jobs in, outcomes out."""

import contextlib
import fcntl
import mmap
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from wmtp.sandbox import filesystem, syscalls, wire
from wmtp.sandbox.jobs import AssertionJob, Job, Limits, Outcome, Verdict, job_to_wire, outcome_from_wire

_PREFIX = "wmtp-sandbox-"  # of the folders, in the system's temporary one
_START_SECONDS = 180.0
_JUDGE_GRACE_SECONDS = 30.0  # what a run may take beyond its limits, its start too, before the judge is given up
_RETRY_SECONDS = 60.0  # for judging again alone, while the others wait: at least, and
_RETRY_SHARE = 0.25  # of the time since the start
_RETRY_FACTOR = 2.0  # by the clock, for a program that was not let compute
_INSTALLED = Path(__file__).resolve().parents[__name__.count(".") - 1]  # the whole package that this is a part of
_LAYERS = ("landlock", "seccomp", "rlimits", "resident memory", "namespaces", "bubblewrap")


class Sandbox:
    """Judges model-written programs; safe to use from several threads, and a context manager.

    Args:
        workers: judge processes; by default one for each CPU this process may use.
        limits: of a program, where its job says nothing else.
        hidden: folders that no program may see, those of tasks with solutions say. The package that the sandbox is
            installed in is hidden in any case.
        allow_unsafe: go on where the kernel offers less than the floor (see the package's docstring).
        _without: layers to leave out, for tests.

    Attributes:
        layers: protections in use, each tried at the start.
        missing: those that are not, with the reason.

    Raises:
        ValueError: not Linux, fewer than one worker, no folder to hide, or less than the floor without `allow_unsafe`.
        RuntimeError: the sandbox's processes do not start.
    """

    layers: tuple[str, ...]
    missing: tuple[str, ...]

    def __init__(
        self,
        *,
        workers: int | None = None,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        hidden: Iterable[str | os.PathLike[str]] = (),
        allow_unsafe: bool = False,
        _without: tuple[str, ...] = (),
    ) -> None:
        if not syscalls.SUPPORTED:
            raise ValueError(f"the sandbox needs Linux on x86-64 or aarch64, got {sys.platform} {syscalls.MACHINE}")
        if workers is None:
            workers = len(os.sched_getaffinity(0))
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers} (Sandbox)")
        if unknown := set(_without) - set(_LAYERS):
            raise ValueError(f"_without must be of {_LAYERS}, got {sorted(unknown)} (Sandbox)")
        for folder in (hidden := tuple(hidden)):
            if not os.path.isdir(folder):
                raise ValueError(f"hidden must name folders, got {os.fspath(folder)!r} (Sandbox)")
        _remove_abandoned()
        root = tempfile.mkdtemp(prefix=_PREFIX)
        outside = os.path.join(root, "outside")
        owned = _own(outside)
        settings = {
            "without": dict.fromkeys(_without, "switched off"),
            "root": root,
            "hidden": filesystem.outermost(os.path.realpath(folder) for folder in (_INSTALLED, *hidden)),
            "outside": outside,
            "floor": not allow_unsafe,
            "bubblewrap": None if "bubblewrap" in _without else shutil.which("bwrap"),
        }
        self._limits, self._gate = limits, _Gate(workers)
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[tuple[Callable, Job, Future] | None] = queue.SimpleQueue()
        self._closed, self._closing = False, threading.Lock()
        # Daemons: an interpreter that ends, on an error say, waits for no job.
        self._threads = [threading.Thread(target=_work, args=(self._jobs,), daemon=True) for _ in range(workers)]
        self._finalizer = weakref.finalize(self, _clean_up, self._workers, self._jobs, root, owned)
        try:
            for _ in range(workers):
                self._workers.append(_Worker(settings))
            for worker in self._workers:
                report = worker.wait_until_ready()
                self._idle.put(worker)
            self.layers, self.missing = tuple(report["layers"]), tuple(report["missing"])
            if not report["floor"] and not allow_unsafe:
                raise ValueError(
                    "this kernel offers less than the sandbox's floor (seccomp, rlimits, and Landlock or a mount "
                    f"namespace): {'; '.join(self.missing)}. Set allow_unsafe=True to run model-written code anyway"
                )
            for thread in self._threads:
                thread.start()
        except BaseException:
            self._finalizer()
            raise

    def submit(self, job: Job) -> "Future[Outcome]":
        """Has `job` judged while the caller goes on; raises ValueError after `close`."""
        with self._closing:
            if self._closed:
                raise ValueError("the sandbox is closed (Sandbox.submit)")
            future: Future[Outcome] = Future()
            self._jobs.put((self._judge, job, future))
            return future

    def judge(self, jobs: Iterable[Job]) -> list[Outcome]:
        """Returns the outcomes of `jobs`, in their order."""
        futures = [self.submit(job) for job in jobs]
        return [future.result() for future in futures]

    @property
    def times_alone(self) -> int:
        """Jobs that were judged a second time, with all others waiting."""
        return self._gate.times_alone

    def close(self) -> None:
        """Finishes the jobs that have begun, cancels those that have not, ends every process."""
        with self._closing:
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while entry := self._jobs.get_nowait():
                entry[2].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._finalizer()

    def _judge(self, job: Job) -> Outcome:
        limits, worker = job.limits or self._limits, self._idle.get()
        try:
            with self._gate.shared():
                outcome, doubtful = worker.judge(job, limits)
            if doubtful:
                with self._gate.alone() as granted:
                    if granted:
                        if outcome.verdict == "timeout":  # others than ours may keep the machine busy
                            limits = replace(limits, wall_seconds=_RETRY_FACTOR * limits.wall_seconds)
                        outcome, _ = worker.judge(job, limits)
                    else:
                        reason = "not judged again alone: the time for that is spent"
                        outcome = replace(outcome, detail=f"{outcome.detail} ({reason})")
        finally:
            self._idle.put(worker)
        return replace(outcome, judged="inside") if isinstance(job, AssertionJob) and job.inside else outcome

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # nobody will read what is being judged
            for worker in self._workers:
                worker.abandon()
        self.close()


class _Worker:
    """One judge process, replaced when it dies or hangs."""

    def __init__(self, settings: dict) -> None:
        self._settings = settings
        self._abandoned = False
        self._flag_file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        self._flag_file.truncate(1)
        self._flag = mmap.mmap(self._flag_file.fileno(), 1)
        self._start()

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="judge-", dir=self._settings["root"])
        flag = self._flag_file.fileno()
        settings = {**self._settings, "flag": flag, "root": self._folder}
        # In a session of its own: Ctrl-C in the terminal ends the recipe, which ends the judges.
        self._judge = wire.Started("judge", settings, descriptors=(flag,), new_session=True)

    def wait_until_ready(self) -> dict:
        """Returns the protections in force; raises RuntimeError where the judge or its zygote did not start."""
        report = self._judge.first_report(_START_SECONDS)
        if "error" in report:
            self.close()
            raise RuntimeError(f"a judge of the sandbox did not start: {report['error']}")
        return report

    def judge(self, job: Job, limits: Limits) -> tuple[Outcome, bool]:
        """Returns the outcome of `job`, and whether another try could end otherwise: a failure of ours, a machine late.

        A judge that dies or hangs is replaced.
        """
        runs = 1 if isinstance(job, AssertionJob) and not job.apart else len(job.tests)
        start = time.monotonic()
        try:
            self._flag[0] = 0
            self._judge.connection.settimeout((limits.wall_seconds + _JUDGE_GRACE_SECONDS) * runs)
            wire.send(self._judge.connection, job_to_wire(job, limits))
            answer = wire.receive(self._judge.connection)
        except OSError:
            answer = None
        if self._abandoned:
            return Outcome("harness_error", "the sandbox was closed", (), (), 0.0, time.monotonic() - start), False
        if answer is not None:
            outcome = outcome_from_wire(answer["outcome"])
            return outcome, answer["starved"] or outcome.verdict == "harness_error"
        begun = self._flag[0] != 0
        self._stop()
        verdict, detail = _blame(self._judge.process.returncode, begun)
        self._start()
        self.wait_until_ready()
        outcome = Outcome(verdict, detail, (verdict,), (), 0.0, time.monotonic() - start)
        return outcome, verdict == "harness_error"

    def _stop(self) -> None:
        """Ends the judge, and with it its zygote and whatever runs there."""
        with contextlib.suppress(OSError):
            self._judge.connection.settimeout(0)
            wire.send(self._judge.connection, {"kind": "close"})
        self._judge.stop()
        filesystem.remove_folder(self._folder)

    def abandon(self) -> None:
        """Breaks off what is being judged; the worker is of no further use."""
        self._abandoned = True
        self._judge.process.kill()

    def close(self) -> None:
        """Ends the judge for good."""
        self._stop()
        self._flag.close()
        self._flag_file.close()


def _blame(returncode: int, begun: bool) -> tuple[Verdict, str]:
    """Says whose fault it is that a judge ended in the middle of a job: ours, if nothing of the program's had begun."""
    name = signal.Signals(-returncode).name if returncode < 0 else f"status {returncode}"
    if not begun:
        return "harness_error", f"the judge ended with {name} before the program had answered"
    if returncode in (-signal.SIGVTALRM, -signal.SIGKILL):
        return "timeout", "no end was come to with the program's answer, or in removing what it left"
    return "violation", f"the judge ended with {name} on the program's answer"


def _own(path: str) -> BinaryIO:
    """Makes a file that no program may read; while it is open, and its process alive, its folder is not abandoned."""
    file = open(f"{path}.new", "w+b")  # noqa: SIM115 (open as long as the sandbox)
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(b"no program may read this")
    file.flush()
    os.rename(f"{path}.new", path)
    return file


def _remove_abandoned() -> None:
    """Removes folders of sandboxes whose judges were killed together with their callers, so that nobody was left to."""
    for outside in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/outside"):
        with contextlib.suppress(OSError), outside.open("rb") as file:  # another user's, or gone meanwhile
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            filesystem.remove_folder(outside.parent)


def _work(jobs: queue.SimpleQueue) -> None:
    """Has jobs judged until told to stop; holds no sandbox meanwhile."""
    while (entry := jobs.get()) is not None:
        judge, job, future = entry
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(judge(job))
            except BaseException as error:
                future.set_exception(error)
        del entry, judge, job, future


def _clean_up(workers: list[_Worker], jobs: queue.SimpleQueue, root: str, owned: BinaryIO) -> None:
    for worker in workers:
        jobs.put(None)
        worker.close()
    workers.clear()
    filesystem.remove_folder(root)
    owned.close()


class _Gate:
    """Lets `width` jobs run at once, or one alone: for `seconds` in all or that share of the time, if it is more."""

    def __init__(self, width: int, seconds: float = _RETRY_SECONDS, share: float = _RETRY_SHARE) -> None:
        self._width, self._places = width, threading.Semaphore(width)
        self._turn = threading.Lock()  # to take places: who wants all of them lets nobody pass
        self._seconds, self._share = seconds, share
        self._start, self._spent = time.monotonic(), 0.0
        self.times_alone = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Runs beside others; waits while somebody wants to be alone."""
        with self._turn:
            self._places.acquire()
        try:
            yield
        finally:
            self._places.release()

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Runs with no other job beside it; False, at once, where the time for that is spent."""
        start = time.monotonic()
        if self._spent >= max(self._seconds, self._share * (start - self._start)):
            yield False
            return
        with self._turn:
            self.times_alone += 1
            for _ in range(self._width):
                self._places.acquire()
            try:
                yield True
            finally:
                self._spent += time.monotonic() - start  # the others wait from the moment it asks
                self._places.release(self._width)
