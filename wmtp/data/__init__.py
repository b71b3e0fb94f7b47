"""Training data: builders of documents from a source, packing into rows, and streams of batches.

A builder is a plain function `builder(tokenizer, **config keys) -> Documents`, named as `_component_` in a config. To
add one, write such a function; `document_from_text` makes a document of a prompt and a completion.
"""

from wmtp.data.documents import IGNORE, SCORES, Document, Documents, DocumentStream, document_from_text
from wmtp.data.mbpp import few_shot_tasks, mbpp, mbpp_prompt, mbpp_task
from wmtp.data.packaged import PACKAGED_TASKS, packaged_functions, packaged_programs
from wmtp.data.packing import BatchStream, PackedDataset, held_out_batches, pack
from wmtp.data.prompt_completion import (
    prompt_completion,
    prompt_completion_stream,
    save_tokenized,
    tokenized,
    tokenized_stream,
)
from wmtp.data.python_source import python_functions
from wmtp.data.rows import read_rows
from wmtp.data.scored import scored

__all__ = [
    "IGNORE",
    "PACKAGED_TASKS",
    "SCORES",
    "BatchStream",
    "Document",
    "DocumentStream",
    "Documents",
    "PackedDataset",
    "document_from_text",
    "few_shot_tasks",
    "held_out_batches",
    "mbpp",
    "mbpp_prompt",
    "mbpp_task",
    "pack",
    "packaged_functions",
    "packaged_programs",
    "prompt_completion",
    "prompt_completion_stream",
    "python_functions",
    "read_rows",
    "save_tokenized",
    "scored",
    "tokenized",
    "tokenized_stream",
]
