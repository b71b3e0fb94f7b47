"""Read by the server of tests/processes.py: the standard library's functions, parsed once for all that it forks."""

from wmtp.data import python_functions
from wmtp.pretrained import byte_tokenizer

python_functions(byte_tokenizer(), split="all")
