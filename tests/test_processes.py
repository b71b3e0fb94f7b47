"""What the server that tests fork from has read, its children need not read again."""

import sys

import processes
from processes import start

from wmtp.data import python_functions
from wmtp.data.python_source import _distinct_functions
from wmtp.pretrained import byte_tokenizer


def all_is_there():
    # The server goes on where an import fails, and every process would import it, or parse it, by itself.
    assert set(processes._IMPORTED) <= sys.modules.keys()
    python_functions(byte_tokenizer(), max_functions=8)
    assert _distinct_functions.cache_info()[:2] == (1, 1)  # hits and misses: the server's own is the only miss


def test_a_forked_process_imports_and_parses_nothing_again(tmp_path):
    start(all_is_there, log=tmp_path / "log.txt").join()
