"""The queue between the recipes and the judges: what is recorded, how often, and at what cost."""

import sys
import time

import pytest

from wmtp.distributed import SharedCounters, start_world
from wmtp.eval import AssertionTask, judging
from wmtp.eval.journal import Journal, read_journals
from wmtp.eval.judging import Judging
from wmtp.eval.samples import Sample
from wmtp.sandbox import Limits, Sandbox

TASK = AssertionTask("Mbpp/1", "", "", "f", "", "", "", ("assert f(1) == 1",))
RIGHT, WRONG, SLEEPS = "f = abs", "def f(x): return 2", "import time\ntime.sleep(99)"


class CountingCounters(SharedCounters):
    """Counters that say how often they were asked."""

    calls = 0

    def add(self, key, amount=0):
        self.calls += 1
        return super().add(key, amount)


@pytest.fixture
def alone():
    """A world of one process."""
    start_world("cpu")


def samples(programs):
    return [Sample(TASK.task_id, index, None, program) for index, program in enumerate(programs)]


def test_every_sample_is_recorded_and_the_bar_is_seldom_drawn(alone, tmp_path, capsys):
    given, counters, started = samples([RIGHT, WRONG] * 30), CountingCounters(), time.monotonic()
    with Journal(tmp_path / "journals", 0, {}) as journal, Sandbox(workers=2) as sandbox:
        queue = Judging(sandbox, journal, counters, total=len(given), name="tasks", show=True)
        for sample in given:
            journal.add_sample(sample)
            queue.submit(TASK, sample, TASK.job(sample.solution))
        queue.finish()
    quarters = (time.monotonic() - started) / 0.25
    judged = read_journals(tmp_path / "journals", {}).judgements
    assert [judged[sample.key].verdict for sample in given] == ["passed", "wrong_answer"] * 30
    assert (counters.add("judged"), counters.add("passed")) == (60, 30)
    bar = capsys.readouterr().err
    assert "60/60" in bar and "passed=30/60 = 0.500" in bar
    assert bar.count("\r") <= quarters / 8 + 4  # every two seconds where it is no terminal; the first, the last, close
    assert counters.calls <= 2 * quarters + 10  # not for each sample


def test_the_work_of_a_submit_does_not_depend_on_how_many_are_waiting(alone, tmp_path):
    """Calls of Python functions, counted while the only judge is held up by a program that sleeps."""

    def calls_of(number):
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            for sample in samples([RIGHT] * number):
                queue.submit(TASK, sample, job)
        finally:
            sys.setprofile(None)
        return calls / number

    with Journal(tmp_path / "journals", 0, {}) as journal:
        sandbox = Sandbox(workers=1, limits=Limits(wall_seconds=1000.0))
        try:
            queue = Judging(sandbox, journal, SharedCounters(), total=1000, name="tasks", show=False)
            job = TASK.job(SLEEPS)
            queue.submit(TASK, samples([SLEEPS])[0], job)
            few, between, many = calls_of(20), calls_of(500), calls_of(20)
            assert abs(few - between) < 1 and abs(few - many) < 1  # of a handful
        finally:
            sandbox.__exit__(KeyboardInterrupt, None, None)  # nobody waits for the sleeper


def test_no_more_samples_wait_than_a_process_may_keep(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "_MOST_WAITING", 3)
    given = samples([RIGHT] * 12)
    with Journal(tmp_path / "journals", 0, {}) as journal, Sandbox(workers=1) as sandbox:
        queue = Judging(sandbox, journal, SharedCounters(), total=len(given), name="tasks", show=False)
        for number, sample in enumerate(given, start=1):
            journal.add_sample(sample)
            queue.submit(TASK, sample, TASK.job(sample.solution))
            journal._file.flush()
            assert number - len(read_journals(tmp_path / "journals", {}).judgements) < 3
        queue.finish()
    assert len(read_journals(tmp_path / "journals", {}).judgements) == 12
