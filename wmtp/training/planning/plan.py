"""The plan of a run: what a card will hold at the worst moment, and how long a step will take.

Bytes, operations and collectives come from one simulated step (wmtp.training.planning.training_step). A time divides
them by what the card does at best, and by the share of it below that large products and streams of memory reach.
"""

import gc
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

from omegaconf import DictConfig, OmegaConf
from torch.distributed.device_mesh import DeviceMesh

from wmtp.config import ConfigError, changed
from wmtp.training.frozen_models import OFFLOAD
from wmtp.training.planning import frozen_step, training_step
from wmtp.training.planning.cards import Card
from wmtp.training.planning.frozen_step import most_rows
from wmtp.training.planning.gpu_kernels import gpu_kernels
from wmtp.training.planning.simulation import Figures
from wmtp.training.planning.training_step import SimulatedStep, shape_of, two_depths

# Shares of the peak: attention, memory, and links under NCCL.
ATTENTION, MEMORY, LINK = 0.5, 0.75, 0.75
KERNEL_SECONDS = 2e-6  # of the shortest kernel
ADVISED = 0.97  # of a card's memory: runs held up to 2 % more than their plans (docs/planning.md)
MOST_TOKENS = 2**20  # of a micro-batch: a simulation keeps some numbers of each, 0.4 KB in all
_simulated: dict[tuple, tuple[Figures, SimulatedStep]] = {}
_OFFLOADED = {"model": ("weights", "gradients", "optimizer"), "frozen": ("frozen models",)}  # held by the host
_CARRIED = {"frozen models": {"frozen models"}, "forward": {"weights"}, "backward": {"weights", "gradients"}}
_PHASES = {"frozen models", "loss", "optimizer", "prefill"}  # shown as one part
_PARTS = {"product": "products", "copy": "copies of gathered weights"}


def short(number: float) -> str:
    """Returns a figure with one decimal, and a small one with two digits."""
    return f"{number:.1f}" if number >= 10 else f"{number:.2g}"


@dataclass(frozen=True)
class Plan:
    """What one card does in a run.

    Attributes:
        card: whose times and memory these are.
        cards: their number.
        held: bytes by kind at the worst moment.
        moment: the phase in which it comes.
        phases: bytes by kind at the worst moment of each phase.
        seconds: of an optimizer step, by part.
        tokens: of an optimizer step, over all cards.
        flops: that the models need for a step on each card (wmtp.training.performance), for the MFU.
        moved: bytes that operations outside of products and attention move in a step, on each card.
        waits: times that the host waits for the device in a step, without logging.
        checkpoint: bytes of a checkpoint: trained weights and the optimizer's state, over all cards.
        unit: what is called a step here.
    """

    card: Card
    cards: int
    held: dict[str, float]
    moment: str
    phases: dict[str, dict[str, float]]
    seconds: dict[str, float]
    tokens: float
    flops: float
    moved: float
    waits: int
    checkpoint: float
    unit: str

    @property
    def memory(self) -> float:
        """Returns the bytes of the worst moment."""
        return sum(self.held.values())

    @property
    def fits(self) -> bool:
        return self.memory <= self.card.memory

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Returns the share of the card's bf16 peak that the models' own operations make up."""
        return self.flops / self.step_seconds / self.card.bf16

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    def line(self, steps: int | None = None) -> str:
        """Says it in one line; with the number of steps also how long they take."""
        largest = sorted(self.held.items(), key=lambda item: -item[1])
        kinds = ", ".join(f"{name} {short(size / 1e9)}" for name, size in largest if size >= 1e-3 * self.memory)
        mfu = f", MFU {self.mfu:.0%}" if self.flops else ""
        hours = 0.0 if steps is None else steps * self.step_seconds / 3600
        length = f"{hours:.1f} h" if hours >= 0.1 else f"{60 * hours:.1f} min"
        length = "" if steps is None else f", {length} for {steps} steps"
        saved = f"; a checkpoint is {short(self.checkpoint / 1e9)} GB" if self.checkpoint else ""
        return (
            f"plan: {short(self.memory / 1e9)} of {self.card.memory / 1e9:.0f} GB on each of {self.cards} x "
            f"{self.card.name} in the {self.moment} ({kinds}); {short(self.step_seconds)} s a {self.unit}, "
            f"{self.tokens_per_second:,.0f} tokens/s{mfu}{length}{saved}"
        )


def plan_config(cfg: DictConfig, mesh: DeviceMesh, card: Card) -> Plan:
    """Plans a config on a mesh of simulated cards.

    Args:
        cfg: of a recipe that trains, scores or evaluates.
        mesh: of torch's fake process group (:func:`~wmtp.training.planning.simulation.fake_world`).
        card: a GPU, or this machine's processor.

    Raises:
        ConfigError, UserError: a part of the config that cannot be built.
    """
    if "optimizer" not in cfg:
        cfg = frozen_step.with_kv_memory(cfg, card.memory)
    figures, step = _measured(cfg, mesh, card.is_gpu)
    held: dict[str, dict[str, float]] = defaultdict(dict)
    moved = waits = 0.0
    for (what, phase, kind, *_), number in figures.items():
        times = step.times(phase)
        if what == "held" and number > 0:
            held[phase][kind] = number
        elif what == "moved" and kind not in ("product", "attention"):
            moved += times * number
        elif what == "waits":
            waits += times * number
    sizes = {kind: max(kinds.get(kind, 0.0) for kinds in held.values()) for kind in set().union(*held.values())}
    offloaded = {kind for whose in OFFLOAD[cfg.get("cpu_offload") or False] for kind in _OFFLOADED[whose]}
    held = {phase: {k: n for k, n in kinds.items() if k not in offloaded} for phase, kinds in held.items()}
    carried = {phase: sum(sizes.get(kind, 0.0) for kind in offloaded & kinds) for phase, kinds in _CARRIED.items()}
    moment = max(held, key=lambda phase: sum(held[phase].values()))
    return Plan(
        card=card,
        cards=mesh.size(),
        held=held[moment],
        moment=moment,
        phases=held,
        seconds=_seconds(figures, card, mesh.size(), step, carried),
        tokens=step.tokens,
        flops=step.flops,
        moved=moved,
        waits=int(waits),
        checkpoint=step.checkpoint * mesh.size(mesh.ndim - 1),
        unit=step.unit,
    )


def _measured(cfg: DictConfig, mesh: DeviceMesh, on_gpu: bool) -> tuple[Figures, SimulatedStep]:
    """Returns a step's figures, simulated once for all configs of one shape."""
    if (tokens := cfg.batch_size * cfg.get("seq_len", 0)) > MOST_TOKENS:
        raise ConfigError(f"a micro-batch of {tokens:,} tokens: at most {MOST_TOKENS:,} are planned; lower batch_size")
    cfg = shape_of(cfg, (training_step if "optimizer" in cfg else frozen_step).READ)
    key = OmegaConf.to_yaml(cfg), mesh.shape, on_gpu
    if key not in _simulated:
        _simulated[key] = _measure(cfg, mesh, on_gpu)
    return _simulated[key]


def _measure(cfg: DictConfig, mesh: DeviceMesh, on_gpu: bool) -> tuple[Figures, SimulatedStep]:
    """Returns a step's figures: of the models themselves where all are shallow, else as two depths tell them."""
    depths = two_depths(cfg)
    with gpu_kernels() if on_gpu else nullcontext(), _without_collector():
        simulate = training_step.simulate_step if "optimizer" in cfg else frozen_step.simulate_frozen
        shallow, deeper = (simulate(cfg, mesh, depth=depth) for depth in depths)
    if max(deeper.depths) <= depths[1]:
        return deeper.figures, deeper

    def at_depth(few: float, more: float, depth: int) -> float:
        return few + (more - few) * (depth - depths[0]) / (depths[1] - depths[0])

    figures = {}
    for key in shallow.figures | deeper.figures:  # in one order: parts of equal size keep theirs
        what, phase, kind, *_ = key
        if what == "held" and phase == "backward of blocks":
            continue  # between the two ends
        few, more = shallow.figures.get(key, 0), deeper.figures.get(key, 0)
        figures[key] = at_depth(few, more, deeper.depths[(kind if what == "held" else phase) == "frozen models"])
    trained = at_depth(shallow.checkpoint, deeper.checkpoint, deeper.depths[0])
    return figures, deeper._replace(checkpoint=trained)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Collects no cycles meanwhile: no tensor is in one, and passes over all that is imported cost a tenth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _seconds(
    figures: Figures, card: Card, cards: int, step: SimulatedStep, carried: dict[str, float]
) -> dict[str, float]:
    """Returns the seconds of a step by part. Collectives, and what is carried from and to the host, run beside the
    computation of their phase; on one card alone FSDP2 copies from the host between computations."""
    work: dict[tuple[str, str], float] = defaultdict(float)  # by phase and kind
    for (what, phase, kind, *dtype), number in figures.items():
        if what == "flops":
            peak = card.fp32 if dtype == ["torch.float32"] else card.bf16
            work[phase, kind] += number / peak / (ATTENTION if kind == "attention" else card.products)
    for (what, phase, kind, *_), number in figures.items():
        if what == "moved":
            moving = max(number / card.bandwidth / MEMORY, figures["calls", phase, kind] * KERNEL_SECONDS)
            work[phase, kind] = max(work[phase, kind], moving)
    parts: dict[str, float] = defaultdict(float)
    computing: dict[str, float] = defaultdict(float)
    for (whole_phase, kind), seconds in work.items():
        phase, times = whole_phase.partition(" of ")[0], step.times(whole_phase)
        computing[phase] += times * seconds
        parts[phase if phase in _PHASES else _PARTS.get(kind, kind)] += times * seconds
    sending = defaultdict(float, {p: step.times(p) * size / card.host / LINK for p, size in carried.items()})
    for (what, phase, *_), number in figures.items():
        if what == "sent":
            seconds = number * (cards - 1) / cards / card.link / LINK
            sending[phase.partition(" of ")[0]] += step.times(phase) * seconds
    waiting = sum(max(0.0, sent - (computing[phase] if cards > 1 else 0.0)) for phase, sent in sending.items())
    return {**parts, "communication": waiting}


def levers(cfg: DictConfig, card: Card) -> dict[str, list[str]]:
    """Returns what a user can turn, by name: the changes of the config, as on a command line."""
    found = {}
    if "optimizer" not in cfg:
        if "seq_len" in cfg:
            return {}
        most = most_rows(cfg, card.memory)
        more = {"as many answers as fit": [f"batch_size={most}"]} if most > cfg.batch_size else {}
        return more | ({"a budget by free memory": ["kv_memory=null"]} if cfg.get("kv_memory") else {})
    asked = cfg.get("anchor") is not None or (cfg.get("heads") or {}).get("teacher") == "reference"
    if cfg.get("reference_model") is not None and not asked:
        scored = "scored column, by score_reference.py, instead of a reference model"
        found[scored] = ["reference_model=null", "reference_checkpoint=null"]
    if "activation_checkpointing" in cfg:
        ways = {"true": "every block recomputed", "2": "every second block recomputed",
                "selective": "all but products and attention recomputed", "false": "all activations kept"}  # fmt: skip
        ways.pop(str(cfg.activation_checkpointing).lower(), None)
        found |= {name: [f"activation_checkpointing={value}"] for value, name in ways.items()}
    if card.is_gpu and cfg.model.get("attention", "sdpa") == "sdpa":
        found["flex attention"] = ["model.attention=flex"]
    if card.is_gpu and not cfg.get("cpu_offload") and cfg.get("reference_model") is not None:
        found["frozen models in host memory"] = ["cpu_offload=frozen"]
    if card.is_gpu and cfg.get("cpu_offload") is not True:
        found["weights and optimizer in host memory"] = ["cpu_offload=true"]
    if "backbone" not in cfg and cfg.get("adapters") is None:
        without = ["~export_dtype"] * ("export_dtype" in cfg)  # a key of the other recipe
        found["LoRA, rank 16, by lora_wmtp.py"] = ["adapters._component_=wmtp.models.add_lora", *without]
    return found


def largest_batch(cfg: DictConfig, mesh: DeviceMesh, card: Card) -> int:
    """Returns the rows of the largest micro-batch that fits the card, of those that are planned; 0: one is too much.

    What a phase holds grows with the rows, the faster the more there are: a line through two plans tells how many fit
    at the most beyond them, and how many do between them.
    """
    sizes: dict[int, dict[str, float]] = {}
    fit, over, rows = 0, MOST_TOKENS // cfg.seq_len + 1, cfg.batch_size  # so many fit, so many do not; the next plan
    while over - fit > 1:
        changes = [f"batch_size={rows}"]
        if rows != cfg.batch_size and cfg.get("compile"):
            changes.append("compile=false")  # holds as many bytes, and its kernels need not be found
        phases = plan_config(changed(cfg.copy(), changes), mesh, card).phases
        if not sizes:  # a guess to begin with
            grows = ("activations", "loss")
            sizes[0] = {name: sum(n for kind, n in held.items() if kind not in grows) for name, held in phases.items()}
        sizes[rows] = {name: sum(held.values()) for name, held in phases.items()}
        fewer = max(other for other in sizes if other < rows)
        more = {name: size - sizes[fewer].get(name, size) for name, size in sizes[rows].items()}
        a_row = {name: max(1.0, size / (rows - fewer)) for name, size in more.items()}
        most = math.floor(min(rows + (card.memory - size) / a_row[name] for name, size in sizes[rows].items()))
        if max(sizes[rows].values()) > card.memory:
            over = rows
        else:
            fit, over = rows, min(over, most + 1) if fewer else over
        rows = max(fit + 1, min(most, over - 1))
    return fit


def ways_out(cfg: DictConfig, mesh: DeviceMesh, card: Card) -> Iterator[str]:
    """Yields the changes that would make a config fit its card with some room, the nearest first.

    Fewer rows keep the tokens of a step. Where no change is enough, one line has several that together are.
    """
    card = replace(card, memory=ADVISED * card.memory)

    def planned(*parts: list[str]) -> Plan:
        return plan_config(changed(cfg.copy(), [change for part in parts for change in part]), mesh, card)

    single, found = levers(cfg, card), False
    if rows := _fewer_rows(cfg, mesh, card):
        found = True
        yield " ".join(rows)
    for name, changes in single.items():
        if planned(changes).fits:
            found = True
            yield f"{' '.join(changes)} ({name})"
    if found or "optimizer" not in cfg:
        return
    together: list[list[str]] = []
    held = planned().memory
    for changes in (_with_rows(cfg, 1), *single.values()):
        plan = planned(*together, changes)
        if plan.memory < held:
            together, held = [*together, changes], plan.memory
        if plan.fits:
            break
    else:
        return
    for changes in together[:-1]:  # what the later ones have made needless
        others = [other for other in together if other is not changes]
        if planned(*others).fits:
            together = others
    yield " ".join(change for part in together for change in part)


def _fewer_rows(cfg: DictConfig, mesh: DeviceMesh, card: Card) -> list[str]:
    """Returns the changes to the most rows that fit; none where one row is too much, or where a batch has no rows."""
    if "seq_len" not in cfg:
        return []
    if not (steps := cfg.get("gradient_accumulation_steps")):
        rows = largest_batch(cfg, mesh, card)
    else:  # gradients stay from one micro-batch to the next
        several = changed(cfg.copy(), [f"gradient_accumulation_steps={max(2, steps)}"])
        most, total = largest_batch(several, mesh, card), steps * cfg.batch_size
        rows = max((rows for rows in range(1, min(most, total) + 1) if total % rows == 0), default=0)
    return _with_rows(cfg, rows) if rows else []


def _with_rows(cfg: DictConfig, rows: int) -> list[str]:
    """Returns the changes to so many rows, a divisor of those of a step, which has as many tokens as before."""
    steps = cfg.get("gradient_accumulation_steps")
    more = [f"gradient_accumulation_steps={steps * cfg.batch_size // rows}"] if steps else []
    return [f"batch_size={rows}", *more]


def lack(plan: Plan, ways: list[str]) -> str:
    """Says by how much a run does not fit its card, and which changes would make it fit."""
    over = (plan.memory - plan.card.memory) / 1e9
    more = "larger cards or, to train, more of them" if plan.card.is_gpu else "more memory"
    way = f"what would fit: {' | '.join(ways)}" if ways else f"no change would fit; use {more}"
    return f"this run lacks {short(over)} GB on each {plan.card.name}; {way}"
