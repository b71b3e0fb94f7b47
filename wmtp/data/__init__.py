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
from wmtp.data.documents import IGNORE, SCORES, Document, Documents, DocumentStream, document_from_text
from wmtp.data.mbpp import few_shot_tasks, mbpp, mbpp_prompt, mbpp_task
from wmtp.data.packaged import PACKAGED_TASKS, packaged_functions, packaged_programs
from wmtp.data.packing import BatchStream, PackedDataset, held_out_batches, pack
from wmtp.data.pair_dataset import PairDataset, balance_lengths, encode_pairs, pair_splits, split_by_problem
from wmtp.data.pairs import Pair, Pairs, code_contests_pairs, condefects_pairs, jsonl_pairs, packaged_pairs
from wmtp.data.prompt_completion import (
    prompt_completion,
    prompt_completion_stream,
    save_tokenized,
    tokenized,
    tokenized_stream,
)
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
from wmtp.data.scored import scored
from wmtp.data.stdio_tasks import StdioTask, code_contests, packaged_program_tasks
from wmtp.data.tokenizer import Tokenizer, byte_tokenizer, hf_tokenizer, require_same_vocabulary

__all__ = [
    "IGNORE",
    "PACKAGED_TASKS",
    "SCORES",
    "AssertionTask",
    "BatchStream",
    "Document",
    "DocumentStream",
    "Documents",
    "PackedDataset",
    "Pair",
    "PairDataset",
    "Pairs",
    "Protocol",
    "StdioTask",
    "Task",
    "Tokenizer",
    "alphacode_prompt",
    "alphacode_protocol",
    "assertion_tasks",
    "balance_lengths",
    "bigcode_protocol",
    "byte_tokenizer",
    "chat_protocol",
    "code_contests",
    "code_contests_pairs",
    "condefects_pairs",
    "docstring_protocol",
    "document_from_text",
    "encode_pairs",
    "few_shot_tasks",
    "held_out_batches",
    "hf_tokenizer",
    "humaneval_protocol",
    "humaneval_tasks",
    "jsonl_pairs",
    "mbpp",
    "mbpp_prompt",
    "mbpp_task",
    "mbpp_tasks",
    "pack",
    "packaged_function_tasks",
    "packaged_functions",
    "packaged_pairs",
    "packaged_program_tasks",
    "packaged_programs",
    "pair_splits",
    "prompt_completion",
    "prompt_completion_stream",
    "python_functions",
    "read_rows",
    "require_same_vocabulary",
    "save_tokenized",
    "scored",
    "split_by_problem",
    "three_shot_protocol",
    "tokenized",
    "tokenized_stream",
]
