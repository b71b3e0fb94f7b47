"""Judging many samples beside whatever makes them: a queue in front of the sandbox, the journal, the progress bar."""

import queue
import sys
import time
from concurrent.futures import Future

from tqdm import tqdm

from wmtp.distributed import SharedCounters
from wmtp.eval.journal import Journal
from wmtp.eval.protocols import Task
from wmtp.eval.samples import Judgement, Sample
from wmtp.sandbox import Sandbox
from wmtp.sandbox.jobs import Job

_MOST_WAITING = 1000  # samples that a process keeps for its judges: more would take memory, and work from other ranks
_TELL_SECONDS = 0.25  # at least, between two additions to the counters of all ranks, and two redraws of the bar
_LOG_SECONDS = 2.0  # the same in a file, where every redraw is a line that stays


class Judging:
    """Has samples judged while the caller goes on, and records each judgement as soon as the caller comes back.

    The work for a sample does not depend on how many there are.

    Args:
        sandbox: judges; the caller closes it.
        journal: of this process.
        counters: shared by all ranks; `judged` and `passed` count the samples of all.
        total: samples that all ranks together will submit.
        name: of the progress bar.
        show: whether this process draws it.
    """

    def __init__(
        self, sandbox: Sandbox, journal: Journal, counters: SharedCounters, *, total: int, name: str, show: bool
    ) -> None:
        self._sandbox, self._journal, self._counters = sandbox, journal, counters
        self._total, self._show = total, show
        self._done: queue.SimpleQueue[tuple[Task, Sample, Future]] = queue.SimpleQueue()
        self._waiting = 0
        self._new = {"passed": 0, "judged": 0}  # not yet in the counters
        self._next_show = 0.0
        seconds = _TELL_SECONDS / 2 if sys.stderr.isatty() else _LOG_SECONDS  # half: `_tell` keeps the time already
        self._progress = tqdm(total=total, disable=not show, desc=name, unit="sample", mininterval=seconds, miniters=1)

    def submit(self, task: Task, sample: Sample, job: Job) -> None:
        """Has a sample of `task` judged as `job`; waits where many are being judged already."""
        future = self._sandbox.submit(job)
        self._waiting += 1
        future.add_done_callback(lambda future: self._done.put((task, sample, future)))
        while not self._done.empty() or self._waiting >= _MOST_WAITING:
            self._record()

    def finish(self) -> None:
        """Waits until all samples of all ranks are judged; a dead rank ends us all."""
        while self._waiting:
            self._record()
        self._tell()
        while self._counters.add("judged") < self._total:
            time.sleep(_TELL_SECONDS)
            self._tell()
        self._progress.close()

    def _record(self) -> None:
        task, sample, future = self._done.get()
        self._waiting -= 1
        outcome = future.result()
        judgement = Judgement.of(task, outcome)
        self._journal.add_judgement(sample, judgement, round(outcome.cpu_seconds, 3))
        self._new["judged"] += 1
        self._new["passed"] += judgement.verdict == "passed"
        if time.monotonic() >= self._next_show:
            self._tell()

    def _tell(self) -> None:
        """Brings the counters of all ranks, and the bar, up to date."""
        passed, judged = (self._counters.add(name, new) for name, new in self._new.items())
        self._new = dict.fromkeys(self._new, 0)
        self._next_show = time.monotonic() + _TELL_SECONDS
        if self._show:
            self._progress.set_postfix_str(f"passed={passed}/{judged} = {passed / max(judged, 1):.3f}", refresh=False)
            self._progress.update(judged - self._progress.n)
