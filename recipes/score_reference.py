"""Scores a dataset once with a frozen model: the reference's CE, or the critic's values, of every token.

    tune run --nproc_per_node 2 recipes/score_reference.py --config configs/tiny/score_reference.yaml
    torchrun --nproc_per_node 4 recipes/score_reference.py --config configs/codellama_7b/score_reference.yaml

Training then reads the result with `wmtp.data.scored` and needs no second model. The dataset is read, tokenized, scored
and written part by part, so memory does not grow with it. Part p belongs to process p mod world size; each process
holds the whole model, or with `fully_shard=true` a shard of it. A killed run goes on with `resume=true`, on any number
of processes: complete parts are kept, after their documents were read again and held against their hash. All processes
write into one output_dir, on a file system that they share.

A part's values depend on its documents alone: with the same batch_size, hardware and thread count the result is the
same, byte for byte, at any number of processes and after any kill; otherwise, and with `fully_shard`, to float
tolerance.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import wmtp  # noqa: F401  # isort: skip  # first: it silences what torchtune says when it is imported
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from wmtp import config
from wmtp.config import ConfigError, ConfigReader, build
from wmtp.data import PackedDataset
from wmtp.data.parts import Part, PartReader, column_of, prefetch, require_finite, rows_to_score
from wmtp.data.scored_dataset import (
    COLUMNS,
    MANIFEST,
    TornPart,
    data_sha256,
    manifest_entry,
    part_header,
    part_path,
    part_paths,
    read_manifest,
    read_part,
    require_same_binding,
    write_column_manifest,
    write_part,
)
from wmtp.distributed import SharedCounters, end_world, gather_objects, on_rank_0, start_world, wait_for_all
from wmtp.errors import UserError, clear_errors, ending
from wmtp.loss import ReferenceReading
from wmtp.models import load_checkpoint, shard_model
from wmtp.models.value import load_value_model, value_tokenizer
from wmtp.pretrained import checkpoint_sha256, hf_tokenizer, require_same_vocabulary, resolve_checkpoint
from wmtp.training.output_dir import check_output_dir, open_output
from wmtp.training.run_log import RunLog, builder_name
from wmtp.training.stopping import StopFlag, stopping

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESULTS = (MANIFEST, "data")  # what a run leaves in output_dir


class ScoreReferenceRecipe:
    """Order of events: read the config, `setup`, `score`, `report`, `cleanup`."""

    def __init__(self, cfg: DictConfig) -> None:
        """Reads and checks every key; nothing is built or written yet."""
        self._cfg = cfg
        read = ConfigReader(cfg)
        self._output_name = str(read.get("output_dir"))
        self._resume = read.choice("resume", {False: "no", True: "yes", "auto": "auto"}, False)
        self._overwrite = read.flag("overwrite", False)
        self._device_name = read.choice("device", {"cpu": "cpu", "cuda": "cuda", "auto": "auto"}, "auto")
        self._dtype_name = read.choice("dtype", {name: name for name in DTYPES}, "fp32")

        self._column = read.choice("column", {name: name for name in COLUMNS}, "reference_ce")
        self._model_cfg = read.section("model", optional=True)
        self._checkpoint = read.get("checkpoint", None)
        self._value_model_path = read.get("value_model", None)
        self._tokenizer_cfg = read.section("tokenizer")
        self._dataset_cfg = read.section("dataset")
        self._seq_len = read.integer("seq_len", minimum=2)

        self._batch_size = read.integer("batch_size", 1, minimum=1)
        self._documents_per_part = read.integer("documents_per_part", 4096, minimum=1)
        self._stop = StopFlag(read.number("max_minutes", None, above=0))
        self._fully_shard = read.flag("fully_shard", False)
        self._timeout_minutes = read.number("timeout_minutes", 30.0, above=0)
        self._tracking_cfg = read.section("tracking", optional=True)
        read.done()

        reference = (self._model_cfg, self._checkpoint)
        if self._column != "values" and (None in reference or self._value_model_path is not None):
            raise ConfigError(f"column={self._column} needs model and checkpoint, and value_model=null")
        if self._column == "values" and (reference != (None, None) or self._value_model_path is None):
            raise ConfigError("column=values needs value_model, and model=null checkpoint=null")

    # ------------------------------------------------------------------------------------------------------------------
    # Set-up

    def setup(self) -> None:
        """Builds everything in the order in which a mistake is cheapest to find: files, data, then the model."""
        self._world = start_world(self._device_name, timeout_minutes=self._timeout_minutes)
        self._output = open_output(self._output_name, self._cfg, resume=self._resume)
        self._output_dir = self._output.folder
        self._log = RunLog(self._output, self._tracking_cfg, is_main=self._world.is_main)
        resumed = self._check_output_dir()
        path = resolve_checkpoint(self._checkpoint or self._value_model_path)
        self._tokenizer = build(self._tokenizer_cfg, where="tokenizer")
        of_value = self._column == "values"
        theirs = value_tokenizer(path) if of_value else hf_tokenizer(path)
        require_same_vocabulary(self._tokenizer, theirs, "value model" if of_value else "reference")
        self._dataset = build(self._dataset_cfg, self._tokenizer, where="dataset")
        if next(self._dataset.read(lambda index: index == 0), None) is None:
            raise UserError(f"{self._dataset.name}: the dataset is empty")
        if self._seq_len > (getattr(self._dataset, "scored_len", None) or self._seq_len):
            raise UserError(
                f"{self._dataset.name} was scored with seq_len {self._dataset.scored_len}; lower seq_len to it"
            )
        self._model = self._build_model(path)
        self._binding = self._what_decides_a_score(path)
        self._complete = self._check_parts()
        self._log.start(
            self._cfg,
            recipe=Path(__file__).stem,
            method="score_reference",
            dataset=builder_name(self._dataset_cfg),
            data_sha256=None,  # the whole data have been read only at the end
            tags={"wmtp.model_sha256": self._binding["model"]["checkpoint_sha256"]},
            resumed=resumed,
            replaces=RESULTS,
        )
        if self._world.is_main:
            for torn in self._output_dir.rglob("*.tmp"):
                torn.unlink()
        wait_for_all()

    def _check_output_dir(self) -> bool:
        """Refuses to write over a scored dataset, or into any other folder; returns whether one goes on there."""
        there = check_output_dir(
            self._output, "a scored dataset", results=RESULTS, overwrite=self._overwrite, resume=self._resume
        )
        if self._resume == "yes" and not there:
            raise ConfigError(f"resume=true, but {self._output_dir} holds no scored dataset")
        return there and self._resume != "no"

    def _build_model(self, path: Path) -> torch.nn.Module:
        """Builds the frozen model in the dtype of the computation: whole on this process's device, or a shard of it."""
        if self._column == "values":
            mesh = self._world.mesh if self._fully_shard else None
            model = load_value_model(path, mesh=mesh, param_dtype=DTYPES[self._dtype_name], device=self._world.device)
            where = "the value model's "
        else:
            with torch.device("meta"):
                model = build(self._model_cfg, where="model").to(DTYPES[self._dtype_name])
            if self._fully_shard:
                shard_model(model, self._world.mesh, param_dtype=DTYPES[self._dtype_name])
            load_checkpoint(model, path, device=self._world.device)
            where = "model."
        if self._seq_len > model.max_seq_len:
            raise ConfigError(f"seq_len {self._seq_len} is longer than {where}max_seq_len {model.max_seq_len}")
        return model.requires_grad_(False).eval()

    def _what_decides_a_score(self, path: Path) -> dict:
        """Returns what the column depends on beside the documents; the manifest names it, a resumed run shares it."""
        section = None if self._model_cfg is None else OmegaConf.to_container(self._model_cfg, resolve=True)
        return {
            "column": self._column,
            "tokenizer": {"vocab_hash": self._tokenizer.vocab_hash()},
            "model": {"checkpoint_sha256": on_rank_0(lambda: checkpoint_sha256(path)), "section": section},
            "seq_len": self._seq_len,
            "dtype": self._dtype_name,
            "documents_per_part": self._documents_per_part,
            **({"must_read": list(self._dataset.must_read)} if self._dataset.must_read else {}),
        }

    def _check_parts(self) -> int | None:
        """Refuses parts of another scoring; returns how many there are where an earlier run completed it."""
        if self._resume == "no":
            return None
        for path in part_paths(self._output_dir):
            try:
                binding, _ = part_header(path)
            except TornPart:
                continue  # its rank removes it
            require_same_binding(binding, self._binding, path)
        complete = (self._output_dir / MANIFEST).exists()
        return len(read_manifest(self._output_dir)["parts"]) if complete else None

    # ------------------------------------------------------------------------------------------------------------------
    # Scoring

    def score(self) -> dict[int, dict]:
        """Scores this rank's parts in turn, while a thread prepares the next; returns their manifest entries."""
        self._counters = SharedCounters()
        self._started = time.perf_counter()
        total = self._dataset.count() if self._world.is_main else None
        self._progress = tqdm(total=total, disable=not self._world.is_main, desc="score", unit="document")
        rank, size = self._world.rank, self._world.size
        if total is not None and total <= self._documents_per_part * (size - 1):
            self._log.info(f"{total} documents are too few parts for {size} processes; lower documents_per_part")
        self._reader = PartReader(self._dataset, self._documents_per_part, lambda number: number % size == rank)
        entries = {}
        for part, rows, entry in prefetch(map(self._prepare, self._reader)):
            if self._stop.wanted_by_any(self._counters):
                break
            if entry is None:
                entry = self._score_part(part, rows)
            else:
                self._counters.add("kept_parts", 1)
            entries[part.number] = entry
            self._counters.add("documents", len(part.documents))
            self._show_progress()
        while self._fully_shard and self._any_rank_works(False):
            self._forward(self._empty_batch())
        self._counters.add("ranks", 1)
        while self._world.is_main and self._counters.add("ranks") < size:  # a dead one ends us all
            self._show_progress()
            time.sleep(0.1)
        self._show_progress()
        self._progress.close()
        self._stop.end(f"with {self._counters.add('documents')} documents scored")
        return entries

    def _prepare(self, part: Part) -> tuple[Part, PackedDataset | None, dict | None]:
        """Returns a part with its rows, or with its manifest entry where it is scored already. Runs in the thread."""
        for document in part.documents:
            if int(document.tokens.max()) >= self._model.vocab_size:
                raise UserError(
                    f"document {document.id} has token id {document.tokens.max()}, the model {self._model.vocab_size} "
                    "ids; use the tokenizer of the model's checkpoint"
                )
        path = part_path(self._output_dir, part.number)
        entry = self._kept(part, path) if path.exists() else None
        if entry is not None:
            return part, None, entry
        if self._complete is not None and part.number >= self._complete:
            raise UserError(
                f"cannot resume: {self._dataset.name} has more documents than when {self._output_dir} was completed; "
                "restore it, or score into another output_dir"
            )
        return part, rows_to_score(part.documents, self._column, self._seq_len, self._tokenizer.pad_id), None

    def _kept(self, part: Part, path: Path) -> dict | None:
        """Returns the manifest entry of a part that is there; removes a torn one and returns None."""
        try:
            _, binding, header = read_part(path)
        except TornPart as torn:
            tqdm.write(f"{torn}; it is scored again", file=sys.stderr)
            (self._output_dir / MANIFEST).unlink(missing_ok=True)
            path.unlink()
            return None
        require_same_binding(binding, self._binding, path)
        if data_sha256(part.documents, self._column) != header["data_sha256"]:
            first, last = part.documents[0].id, part.documents[-1].id
            raise UserError(
                f"cannot resume: documents {first} to {last} of {self._dataset.name} are not those that {path} was "
                "scored from; restore the source and the tokenizer, or score into another output_dir"
            )
        return manifest_entry(path, header)

    def _score_part(self, part: Part, rows: PackedDataset | None) -> dict:
        """Scores a part's rows and writes its file; returns its manifest entry."""
        scores = []
        for batch in self._batches(rows):
            if self._fully_shard:
                self._any_rank_works(True)
            scores.append(self._forward(batch))
            self._counters.add("tokens", int((batch["document_ids"] >= 0).sum()))
            self._show_progress()
        columns = {}
        for number, name in enumerate(COLUMNS[self._column]):
            everything = torch.cat([of[number] for of in scores]).float().cpu().numpy() if scores else None  # [R, S]
            columns[name] = column_of(part.documents, rows, everything)
            require_finite(part.documents, columns[name], name)
        return write_part(part_path(self._output_dir, part.number), part.documents, columns, self._binding)

    def _batches(self, rows: PackedDataset | None) -> Iterator[dict]:
        for start in range(0, 0 if rows is None else len(rows), self._batch_size):
            yield rows.batch(list(range(start, min(start + self._batch_size, len(rows)))))

    @torch.no_grad()
    def _forward(self, batch: dict) -> torch.Tensor:
        """Returns [columns, B, S] float32: CE (and mass) of head 1 for each target, or the value of each prefix."""
        tokens, labels, document_ids = (
            batch[key].to(self._world.device) for key in ("tokens", "labels", "document_ids")
        )
        if self._column == "values":
            return self._model(tokens, document_ids=document_ids)[None]
        reading = ReferenceReading(COLUMNS[self._column])
        read = self._model(tokens, document_ids=document_ids, num_heads=1, loss_fn=reading, labels=labels)
        return torch.stack([read["signals"][name] for name in COLUMNS[self._column]])

    def _any_rank_works(self, works: bool) -> bool:
        """Returns whether any rank has a batch: a sharded model's forward is a collective, which all ranks join."""
        return any(gather_objects(works))

    def _empty_batch(self) -> dict:
        """Returns padding alone, for a rank that has no batch while others have."""
        shape = (1, 2)
        fill = {"tokens": self._tokenizer.pad_id, "labels": -100, "document_ids": -1}
        return {name: torch.full(shape, value) for name, value in fill.items()}

    def _show_progress(self) -> None:
        if self._world.is_main:
            self._progress.update(self._counters.add("documents") - self._progress.n)
            seconds = time.perf_counter() - self._started
            self._progress.set_postfix({"tokens/s": f"{self._counters.add('tokens') / seconds:.0f}"})

    # ------------------------------------------------------------------------------------------------------------------
    # Results

    def report(self, entries: dict[int, dict]) -> dict | None:
        """Writes the manifest over all ranks' parts, on rank 0, and logs the totals; returns the manifest."""
        seconds = time.perf_counter() - self._started
        everyone = gather_objects((entries, self._reader.num_documents))
        if not self._world.is_main:
            return None
        entries = {number: entry for theirs, _ in everyone for number, entry in theirs.items()}
        counts = {documents for _, documents in everyone}
        beyond = [path for path in part_paths(self._output_dir) if f"data/{path.name}" not in _files(entries)]
        if len(counts) > 1:
            raise UserError(f"{self._dataset.name} changed while it was read: ranks found {sorted(counts)} documents")
        if beyond:
            raise UserError(
                f"cannot resume: {self._dataset.name} ends before the documents of {beyond[0]}; restore it, or score "
                "into another output_dir"
            )
        manifest = write_column_manifest(
            self._output_dir, self._binding, [entries[number] for number in sorted(entries)]
        )
        data, scored_now = manifest["data"], self._counters.add("tokens")
        kept = self._counters.add("kept_parts")
        name = "mean value" if self._column == "values" else "mean CE"
        line = f"{data['documents']} documents, {data['tokens']} tokens, {data['targets']} targets in {len(entries)} "
        line += f"parts{f' ({kept} were there)' * bool(kept)}, {name} {manifest['mean']:.4f}"
        if data["cut_documents"]:
            line += f", {data['cut_documents']} documents cut to {self._seq_len} tokens"
        self._log.info(f"{line}, {scored_now / seconds:.0f} tokens/s")
        self._log.info(f"wrote {self._output_dir / MANIFEST}")
        metrics = {f"score/{key}": data[key] for key in ("documents", "tokens", "targets", "cut_documents")}
        metrics[f"score/{name.replace(' ', '_').lower()}"] = manifest["mean"]
        metrics["score/tokens_per_second"] = scored_now / seconds
        self._log.result(metrics, self._output_dir / MANIFEST, tags={"wmtp.data_sha256": data["sha256"]})
        return manifest

    def cleanup(self, status: str = "FINISHED") -> None:
        """Ends the MLflow run and leaves the process group."""
        self._log.close(status)
        if status == "FINISHED":
            end_world()
        self._output.close(fail=status == "FINISHED")


def _files(entries: dict[int, dict]) -> set[str]:
    return {entry["file"] for entry in entries.values()}


@clear_errors()
@stopping()
@config.parse
def main(cfg: DictConfig) -> None:
    recipe = ScoreReferenceRecipe(cfg)
    recipe.setup()
    with ending(recipe.cleanup):
        recipe.report(recipe.score())


if __name__ == "__main__":
    main()
