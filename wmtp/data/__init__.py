"""Data: builders that turn a source into documents, tokenizers, packing into rows, and streams of batches.

A builder is a plain function `builder(tokenizer, **config keys) -> Documents`, named as `_component_` in a config. To
add one, write such a function; `document_from_text` makes a document out of a prompt and a completion.

Evaluation tasks are built the same way, without the tokenizer: `mbpp_tasks`, `humaneval_tasks`, `assertion_tasks`,
`packaged_function_tasks`, `code_contests`, `packaged_program_tasks`; a `*_protocol` says how a model is asked.
"""

from wmtp.data.assertion_tasks import (
    AssertionTask,
    assertion_tasks,
    humaneval_tasks,
    mbpp_tasks,
    packaged_function_tasks,
)
from wmtp.data.documents import IGNORE, Document, Documents, document_from_text
from wmtp.data.mbpp import few_shot_tasks, mbpp, mbpp_prompt, mbpp_task
from wmtp.data.packaged import packaged_functions, packaged_programs
from wmtp.data.packing import BatchStream, PackedDataset, held_out_batches, pack
from wmtp.data.prompt_completion import prompt_completion, save_tokenized, tokenized
from wmtp.data.protocols import (
    Protocol,
    Task,
    alphacode_prompt,
    alphacode_protocol,
    bigcode_protocol,
    chat_protocol,
    docstring_protocol,
    humaneval_protocol,
    three_shot_protocol,
)
from wmtp.data.python_source import python_functions
from wmtp.data.rows import read_rows
from wmtp.data.stdio_tasks import StdioTask, code_contests, packaged_program_tasks
from wmtp.data.tokenizer import Tokenizer, byte_tokenizer, hf_tokenizer, require_same_vocabulary

__all__ = [
    "IGNORE",
    "AssertionTask",
    "BatchStream",
    "Document",
    "Documents",
    "PackedDataset",
    "Protocol",
    "StdioTask",
    "Task",
    "Tokenizer",
    "alphacode_prompt",
    "alphacode_protocol",
    "assertion_tasks",
    "bigcode_protocol",
    "byte_tokenizer",
    "chat_protocol",
    "code_contests",
    "docstring_protocol",
    "document_from_text",
    "few_shot_tasks",
    "held_out_batches",
    "hf_tokenizer",
    "humaneval_protocol",
    "humaneval_tasks",
    "mbpp",
    "mbpp_prompt",
    "mbpp_task",
    "mbpp_tasks",
    "pack",
    "packaged_function_tasks",
    "packaged_functions",
    "packaged_program_tasks",
    "packaged_programs",
    "prompt_completion",
    "python_functions",
    "read_rows",
    "require_same_vocabulary",
    "save_tokenized",
    "three_shot_protocol",
    "tokenized",
]
