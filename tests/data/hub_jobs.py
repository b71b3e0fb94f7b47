"""What processes of test_hub.py do (`HubProcesses`): they have the test's server as their hub."""

from pathlib import Path

import datasets
from omegaconf import OmegaConf

from wmtp.data import document_files, prompt_completion_stream
from wmtp.data.hub import commit_of
from wmtp.errors import clear_errors
from wmtp.pretrained import byte_tokenizer
from wmtp.training.packed_data import packed_data

TOKENIZER = byte_tokenizer(chat_template=Path(__file__).with_name("chat_templates") / "qwen_2_5.jinja")


def pack(
    cache: str | None, builder="prompt_completion", seconds_a_part: float = 5.0, tries: int = 20, workers=1, **keys
):
    """Packs a data set as a recipe does, and tells what distinguishes the rows."""
    document_files._SECONDS_A_PART, datasets.config.STREAMING_READ_MAX_RETRIES = seconds_a_part, tries
    section = OmegaConf.create({"_component_": f"wmtp.data.{builder}", **keys})
    with clear_errors():
        rows = {"packed": True, "cache": cache, "workers": workers}
        made = packed_data(section, TOKENIZER, "dataset", 64, **rows)
    names = [name for row in range(len(made)) for name in made.row_ids(row)]
    told = {name: getattr(made, name) for name in ("rows_sha256", "fingerprint", "unread", "name")}
    return {**told, "signals": sorted(made.signals), "documents": len(made.members), "names": sorted(names)}


def stream(**keys):
    """Reads a stream for scoring: the number that it tells beforehand, and the documents' tokens."""
    found = prompt_completion_stream(TOKENIZER, **keys)
    return {"count": found.count(), "tokens": [document.tokens.tolist() for _, document in found.read()]}


def commit(source: str):
    """Asks for a data set's commit, as every rank does."""
    return commit_of(source)


def load(name: str):
    """Loads a data set as a user does beforehand, into the cache of `datasets`."""
    return len(datasets.load_dataset(name, split="train"))
