"""Data: builders that turn a source into documents, tokenizers, packing into rows, and streams of batches.

A builder is a plain function `builder(tokenizer, **config keys) -> Documents`, named as `_component_` in a config. To
add one, write such a function; `document_from_text` makes a document out of a prompt and a completion.
"""

from wmtp.data.documents import IGNORE, Document, Documents, document_from_text
from wmtp.data.mbpp import few_shot_tasks, mbpp, mbpp_prompt, mbpp_task
from wmtp.data.packaged import packaged_functions, packaged_programs
from wmtp.data.packing import BatchStream, PackedDataset, held_out_batches, pack
from wmtp.data.prompt_completion import prompt_completion, save_tokenized, tokenized
from wmtp.data.python_source import python_functions
from wmtp.data.rows import read_rows
from wmtp.data.tokenizer import Tokenizer, byte_tokenizer, hf_tokenizer, require_same_vocabulary

__all__ = [
    "IGNORE",
    "BatchStream",
    "Document",
    "Documents",
    "PackedDataset",
    "Tokenizer",
    "byte_tokenizer",
    "document_from_text",
    "few_shot_tasks",
    "held_out_batches",
    "hf_tokenizer",
    "mbpp",
    "mbpp_prompt",
    "mbpp_task",
    "pack",
    "packaged_functions",
    "packaged_programs",
    "prompt_completion",
    "python_functions",
    "read_rows",
    "require_same_vocabulary",
    "save_tokenized",
    "tokenized",
]
