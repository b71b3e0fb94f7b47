"""The record of a running evaluation, which survives kill -9: samples and judgements, merged over all processes."""

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from wmtp.config import differences
from wmtp.errors import UserError
from wmtp.eval.samples import Judgement, Key, Sample
from wmtp.files import take_lock

_HASHED = {  # settings of which a journal has the SHA-256 alone, as a person knows them
    "samples_sha256": "the samples in the file",
    "tasks_sha256": "the tasks",
    "prompts_sha256": "the prompts",
    "checkpoint_sha256": "the checkpoint's weights",
}


class Journal:
    """One process's record of a running evaluation, in `{folder}/journal-{rank}.jsonl`.

    A record is in the file when the call returns, so kill -9 loses at most the one being written. Safe to call from
    several threads. Of the ranks of one run, each has its own file; :func:`read_journals` reads those of all, whatever
    their number was when they were written. All ranks must have read before any of them goes on to write.

    Args:
        folder: made where absent.
        rank: of this process.
        settings: JSON values that decide what a sample is (model, prompt, seed, ...): a journal of other settings is
            not continued.

    Raises:
        ValueError: the file is of other settings, or another process is writing it.
    """

    def __init__(self, folder: str | Path, rank: int, settings: Mapping[str, object]) -> None:
        path = Path(folder) / f"journal-{rank:05d}.jsonl"
        self._lock = threading.Lock()
        descriptor = take_lock(path, wait=False)
        if descriptor is None:
            raise UserError(f"{path} is being written by another process; use another output folder")
        self._file = os.fdopen(descriptor, "r+b")
        try:
            records = _read_journal(path)
            # A torn last line would swallow the next record; a head alone may be that of other settings.
            whole = path.read_bytes().rfind(b"\n") + 1 if len(records) > 1 else 0
            self._file.truncate(whole)
            self._file.seek(whole)
            if whole:
                _require_same(records[0], settings, path)
            else:
                self._append({"settings": dict(settings)})
        except BaseException:
            self._file.close()
            raise

    def add_sample(self, sample: Sample) -> None:
        """Records a sample as soon as it is generated."""
        self._append({"sample": asdict(sample)})

    def add_judgement(self, sample: Sample, judgement: Judgement, cpu_seconds: float | None = None) -> None:
        """Records the judge's outcome; a later judgement of the same sample replaces a `harness_error` only."""
        self._append({"judged": sample.key, "judgement": asdict(judgement), "cpu_seconds": cpu_seconds})

    def close(self) -> None:
        """Brings the file to the disk and lets others write it."""
        with self._lock:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _append(self, record: dict) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()


@dataclass(frozen=True)
class Journaled:
    """What the journals of a run hold."""

    samples: dict[Key, Sample]
    judgements: dict[Key, Judgement]
    cpu_seconds: dict[Key, float | None] = field(default_factory=dict)  # of the judged programs


def journaled_settings(folder: str | Path) -> dict:
    """Returns the settings of a run's journals; empty where there is none."""
    for path in sorted(Path(folder).glob("journal-*.jsonl")):
        if records := _read_journal(path):
            return records[0].get("settings", {})
    return {}


def read_journals(folder: str | Path, settings: Mapping[str, object]) -> Journaled:
    """Reads all that the processes of a run recorded, however many they were; empty where there is no journal.

    A torn last line is dropped, in each file. `harness_error` gives way to another verdict of the same sample.

    Raises:
        ValueError: a journal of other settings, a malformed line before the last (file:line), or two journals that
            contradict each other: two evaluations wrote into one folder.
    """
    samples: dict[Key, Sample] = {}
    judgements: dict[Key, Judgement] = {}
    cpu_seconds: dict[Key, float | None] = {}
    for path in sorted(Path(folder).glob("journal-*.jsonl")):
        records = _read_journal(path)
        for number, record in enumerate(records if len(records) > 1 else [], start=1):
            where = f"{path}:{number}"
            if number == 1:
                _require_same(record, settings, path)
            elif "sample" in record:
                sample = Sample(**record["sample"])
                _put(samples, sample.key, sample, where)
            elif "judgement" in record:
                key, judgement = tuple(record["judged"]), Judgement(**record["judgement"])
                if key in judgements and "harness_error" in (judgements[key].verdict, judgement.verdict):
                    judgement = max(judgement, judgements.pop(key), key=lambda j: j.verdict != "harness_error")
                _put(judgements, key, judgement, where)
                cpu_seconds[key] = record.get("cpu_seconds")
            else:
                raise UserError(f"{where}: not a record of a journal: {json.dumps(record):.60}")
    lost = next((key for key in judgements if key not in samples), None)
    if lost is not None:
        raise UserError(f"{folder}: a judgement of {lost}, but no journal holds that sample; a journal was removed")
    return Journaled(samples, judgements, cpu_seconds)


def _read_journal(path: Path) -> list[dict]:
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end was torn
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: malformed record in a journal: {error}") from None
    return records


def _require_same(header: dict, settings: Mapping[str, object], path: Path) -> None:
    """Refuses a journal of other settings; the file's name, `samples`, may change as long as its content does not."""
    if "settings" not in header:
        raise UserError(f"{path}:1: not the head of a journal; move this file out of the evaluation's folder")
    theirs, ours = header["settings"], json.loads(json.dumps(dict(settings)))
    # A solution's time is measured once; a run that goes on has taken it from the journal.
    changed = [name for name in ours | theirs if theirs.get(name) != ours.get(name) and name != "gold_seconds"]
    if changed in ([], ["samples"]):
        return
    hashed = [_HASHED[name] for name in changed if name in _HASHED]
    told = [name for name in changed if name not in _HASHED]
    shown = differences({n: theirs.get(n) for n in told}, {n: ours.get(n) for n in told}) or [" and ".join(hashed)]
    raise UserError(
        f"{path} is of an evaluation with other settings: {', '.join(shown)}{' changed' * (not told)}; use another "
        "output_dir, the earlier settings to go on, or overwrite=true to start again"
    )


def _put(records: dict, key: Key, value: object, where: str) -> None:
    if records.setdefault(key, value) != value:
        raise UserError(
            f"{where}: contradicts what another line says of task {key[0]}, temperature {key[1]}, sample {key[2]}; "
            "two evaluations wrote into this folder: use an empty one"
        )
