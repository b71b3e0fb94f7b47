import functools
import os
import re
import signal
import threading
from pathlib import Path

import pytest

# A script starts its background jobs with SIGINT ignored, and what is ignored is inherited: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny products are not worth a second thread, and beside other workers each would wait for it, at full speed.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="leave out slow tests, and all files that start processes")


def pytest_configure(config):
    if config.getoption("--fast"):
        config.option.markexpr = "not slow and not long"


def pytest_ignore_collect(collection_path, config):
    """With --fast, a file that starts processes is not even imported: so neither is what only such files need."""
    return True if config.getoption("--fast") and _starts_processes(collection_path) else None


# Those of wmtp that write lines, or hold files and leases: in the next test they would go on doing so.
THREADS = {"upload", "lease", "tracking", "second-signal"}


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test():
    before = set(threading.enumerate())
    yield
    began = [thread for thread in threading.enumerate() if thread not in before and thread.name in THREADS]
    for thread in began:
        thread.join(60)  # one that was told to end may have a request under way
    left = [thread.name for thread in began if thread.is_alive()]
    assert not left, f"threads that this test leaves behind: {left}"


# Each takes minutes: one that begins last runs alone at the end, beside idle cores.
LONGEST = ("test_tutorial", "test_full_finetune", "test_sweep", "test_attacks", "test_eval_recipes", "test_study_page")


def pytest_collection_modifyitems(items):
    """The longest files come first."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_report_header(config):
    if config.getoption("--fast"):
        files = [file for file in TESTS.rglob("test_*.py") if _starts_processes(file) or _starts_processes(file.parent)]
        count = sum(file.read_text().count("\ndef test_") for file in files)
        return f"fast: without {count} tests in {len(files)} files that start processes, and without those marked slow"


def _starts_processes(path):
    """Returns whether a file, or a folder's conftest.py, imports what starts processes, or one of ours that does."""
    file = path / "conftest.py" if path.is_dir() else path
    return file.is_file() and _imports(_starters(), file)


@functools.cache
def _starters():
    own = "subprocess|multiprocessing|Sandbox"
    return "|".join([own, *(file.stem for file in TESTS.glob("*.py") if _imports(own, file))])


def _imports(names, file):
    return re.search(rf"^ *(from|import) .*\b({names})\b", file.read_text(), re.MULTILINE) is not None
