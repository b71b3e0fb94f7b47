"""Training data: builders of documents from a source, packing into rows, and streams of batches.

A builder is a plain function `builder(tokenizer, **config keys) -> Documents`, named as `_component_` in a config. To
add one, write such a function; `document_from_text` makes a document of a prompt and a completion. One that reads rows
may say how in :mod:`wmtp.data.reading`, and has both forms: in memory, for training, and a stream, for scoring.
"""

from wmtp import on_demand
from wmtp.data.documents import IGNORE, SCORES, Document, Documents, DocumentStream, comes_from, document_from_text
from wmtp.data.packing import BatchStream, PackedDataset, pack, validation_batches

__getattr__ = on_demand(
    __name__,
    completions="prompt_completion prompt_completion_stream save_tokenized tokenized tokenized_stream",
    conversations="chat chat_stream",
    instructions="instruct instruct_stream",
    mbpp_rows="few_shot_tasks mbpp mbpp_prompt mbpp_task",
    mixing="mixture",
    packaged="PACKAGED_TASKS packaged_functions packaged_programs",
    plain_text="text text_stream",
    python_source="python_functions",
    rows="read_rows",
    scored_dataset="scored",
)
