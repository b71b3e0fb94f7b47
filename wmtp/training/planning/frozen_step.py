"""What a config does that trains nothing, simulated on one card: scoring a dataset, sampling answers, judging heads.

The models are whole on each card. Of decoding, real requests go through the real batching: prompts as long as they can
be, as many rows as the config and the budget of keys and values admit, one step in the middle of the answers, which
tells the time, and the last one, which holds the most.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from wmtp.config import ConfigError, ConfigReader, build
from wmtp.generation import Request, Sampling, linear
from wmtp.generation.cached_decoder import KVCache
from wmtp.generation.generate import Batch, _Prompt
from wmtp.generation.kv_memory import FREE_SHARE, check_kv_memory, kv_bytes_per_token, kv_positions
from wmtp.generation.requests import DecodingStats
from wmtp.loss import score_heads
from wmtp.loss.reference import SIGNALS, ReferenceReading
from wmtp.models import shard_model
from wmtp.models.decoder import MTPDecoder
from wmtp.models.teacher_forced import TeacherForced
from wmtp.pretrained import byte_tokenizer
from wmtp.training.performance import model_flops
from wmtp.training.planning.simulation import Simulation
from wmtp.training.planning.training_step import DTYPES, SimulatedStep, cut_down, packed_tokens

READ = ("model", "column", "fully_shard", "dtype", "seq_len", "batch_size", "num_samples", "temperatures",
        "temperature", "top_p", "max_new_tokens", "num_drafts", "kv_memory", "prompt_tokens", "speed_prompts",
        "speed_batch_size")  # fmt: skip


def simulate_frozen(cfg: DictConfig, mesh: DeviceMesh, *, depth: int | None = None) -> SimulatedStep:
    """Simulates a batch of `score_reference.py` or of `eval_heads.py`, or a round of answers of the other evaluations.

    Args:
        cfg: with ``kv_memory`` in bytes (:func:`with_kv_memory`) and, if wanted, ``prompt_tokens``; without it, prompts
            and answers fill the model's context.
        mesh, depth: as in :func:`~wmtp.training.planning.training_step.simulate_step`.

    Raises:
        ConfigError, UserError: a model that cannot be built, or decodes not even one row.
    """
    if cfg.get("column") == "values":
        raise ConfigError("plan_memory plans no column=values: a value model's shape is in its folder alone")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        if "seq_len" not in cfg:
            return _of_answers(cfg, mesh, depth)
        batch, speed = _of_rows(cfg, mesh, depth), _with_all_heads(cfg)
        if speed is None:
            return batch
        answers = _of_answers(speed, mesh, depth).figures.items()  # after the last batch: it counts if it holds more
        return batch._replace(figures=batch.figures | {key: size for key, size in answers if key[0] == "held"})


def _with_all_heads(cfg: DictConfig) -> DictConfig | None:
    """Returns the config of the decoding by which `eval_heads.py` measures the heads' speed, if it does."""
    heads = _whole(cfg).num_future_tokens
    prompts = cfg.get("speed_prompts", 0 if "column" in cfg else 8)
    if heads == 1 or prompts == 0:
        return None
    rows = min(prompts, cfg.get("speed_batch_size") or 1)
    return DictConfig({**cfg, "batch_size": rows, "num_drafts": heads - 1, "num_samples": 1})


def with_kv_memory(cfg: DictConfig, memory: float) -> DictConfig:
    """Returns a config whose budget of keys and values is set: by default what weights leave, as decoding takes it.

    Raises:
        ConfigError: weights leave nothing.
    """
    if "max_new_tokens" not in cfg:
        return cfg
    size = ConfigReader(cfg).num_bytes("kv_memory", None)
    if size is None:
        model = _whole(cfg)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        size = int(FREE_SHARE * (memory - weights))
        if size < 1:
            half = "dtype=bf16 halves them" if cfg.dtype == "fp32" else "use a larger card"
            raise ConfigError(
                f"this run lacks {(weights - memory) / 1e9:.1f} GB for its weights alone, {weights / 1e9:.1f} GB on "
                f"each card: an evaluation does not shard them; {half}"
            )
    cfg = cfg.copy()
    cfg.kv_memory = size
    return cfg


def rows_at_once(cfg: DictConfig) -> tuple[int, int, int]:
    """Returns how many rows a card decodes together, of how many prompts, and of how many tokens each prompt is."""
    model, drafts, new = _whole(cfg), cfg.get("num_drafts") or 0, cfg.max_new_tokens
    prompt = cfg.get("prompt_tokens") or model.max_seq_len - new
    if not 0 < prompt <= model.max_seq_len - new:
        raise ConfigError(
            f"a prompt of {prompt} tokens and max_new_tokens {new} exceed max_seq_len {model.max_seq_len}"
        )
    check_kv_memory(cfg.kv_memory, model, prompt, new, num_drafts=drafts, name="the longest prompt")
    room, samples = cfg.kv_memory // kv_bytes_per_token(model, drafts), cfg.get("num_samples") or 1
    rows = min(cfg.batch_size, room // kv_positions(0, 0, 1, new, drafts))
    while kv_positions(math.ceil(rows / samples), prompt, rows, new, drafts) > room:
        rows -= 1
    return rows, math.ceil(rows / samples), prompt


def most_rows(cfg: DictConfig, memory: float) -> int:
    """Returns how many answers the budget of keys and values has room for, on a card of so many bytes."""
    cfg = with_kv_memory(cfg, memory).copy()
    cfg.batch_size = 2**31
    return rows_at_once(cfg)[0]


def _whole(cfg: DictConfig) -> MTPDecoder:
    with torch.device("meta"):
        return build(cfg.model, where="model").to(DTYPES[cfg.dtype])


def _placed(cfg: DictConfig, mesh: DeviceMesh, depth: int | None, simulation: Simulation) -> tuple[MTPDecoder, int]:
    """Returns the model of so many blocks with fake weights, and the number of blocks that it has in truth."""
    model = _whole(cfg)
    blocks = len(model.layers)
    cut_down(model, depth)
    if cfg.get("fully_shard"):
        shard_model(model, mesh, param_dtype=DTYPES[cfg.dtype])
    with simulation.mode:
        model.to_empty(device="cpu")
    return model.requires_grad_(False).eval(), blocks


def _of_rows(cfg: DictConfig, mesh: DeviceMesh, depth: int | None) -> SimulatedStep:
    """Simulates a batch of rows: their cross-entropy by head 1, or all figures of each head."""
    simulation = Simulation(small=8 * cfg.batch_size * cfg.seq_len)
    model, blocks = _placed(cfg, mesh, depth, simulation)
    batch = packed_tokens(cfg.batch_size, cfg.seq_len)
    labels, number = batch["tokens"].clone(), batch["tokens"].numel()
    heads = 1 if "column" in cfg else model.num_future_tokens
    with simulation:
        simulation.hold(list(model.parameters()), "weights")
        simulation.reset()
        with simulation.phase("forward", "activations"):
            if "column" in cfg:
                model(**batch, num_heads=1, loss_fn=ReferenceReading([*SIGNALS[:1], cfg.column]), labels=labels)
            else:
                model(**batch, loss_fn=score_heads, labels=labels)
                TeacherForced(model, heads)(**batch, num_heads=1, loss_fn=score_heads, labels=labels)
    flops = model_flops(_whole(cfg).requires_grad_(False)).of(number, cfg.seq_len, [number] * heads)
    return SimulatedStep(simulation.figures(), {"": 1.0}, number * mesh.size(), flops, (blocks, 0), 0.0, "batch")


def _of_answers(cfg: DictConfig, mesh: DeviceMesh, depth: int | None) -> SimulatedStep:
    """Simulates a round of answers, as many as are decoded at once."""
    rows, prompts, length = rows_at_once(cfg)
    samples, new = cfg.get("num_samples") or 1, cfg.max_new_tokens
    simulation = Simulation(small=max(4096, 8 * rows))
    model, blocks = _placed(cfg, mesh, depth, simulation)
    temperature = cfg.get("temperature") or max(cfg.get("temperatures") or [0.0])
    sampling = Sampling(new, temperature, cfg.get("top_p") or 1.0)
    requests = [Request(row, (1 + row % prompts,) * length, (0, row)) for row in range(rows)]
    requests.sort(key=lambda request: request.prompt)
    batch = Batch(model, byte_tokenizer(), sampling, rows, cfg.get("num_drafts") or 0, 2**62, DecodingStats())
    with simulation, _kinds(simulation), patch.object(Batch, "_prefill", _last_prefill(simulation, prompts)):
        simulation.hold(list(model.parameters()), "weights")
        simulation.reset()
        with simulation.phase("growth of caches", "activations"):
            batch._prepare()
            batch._first_tokens(batch._take(iter(requests)))
        for phase, done in (("decoding", new // 2), ("last decoding step", new - 1)):
            for step in ("growth of caches", phase):
                for row in batch._rows:
                    row.tokens[:] = [0] * done
                with simulation.phase(step, "activations"):
                    batch._step()
    repeats = {"": 0.0, "prefill": rows / samples, "decoding": float(new)}
    return SimulatedStep(
        simulation.figures(), repeats, float(rows * new * mesh.size()), 0.0, (blocks, 0), 0.0,
        f"round of {rows} answers of {new} tokens to prompts of {length}",
    )  # fmt: skip


def _last_prefill(simulation: Simulation, prompts: int) -> Callable:
    """Returns a stand-in of `Batch._prefill`: of prompts of one length the last tells the time of each, and finds the
    fullest caches. The others hold their logits alone, and their places."""
    original = Batch._prefill

    def prefill(batch: Batch, request: Request) -> Any:
        if len(batch._prompts) + 1 == prompts:
            with simulation.phase("prefill", "activations"):
                return original(batch, request)
        heads, vocab = 1 + batch._num_drafts, batch._model.vocab_size
        batch._prompts.append(_Prompt(tuple(request.prompt), batch._draft_logits.new_zeros(heads, 1, vocab)))
        batch._stats.prefills += 1
        return batch._prompts[-1]

    return prefill


@contextlib.contextmanager
def _kinds(simulation: Simulation) -> Iterator[None]:
    """Names what decoding allocates beside activations."""

    def named(of: Any, name: str, kind: str) -> Any:
        original = getattr(of, name)

        def within(*args: Any, **kwargs: Any) -> Any:
            with simulation.kind(kind):
                return original(*args, **kwargs)

        return patch.object(of, name, within)

    def packed(weight: Tensor, bias: Tensor | None = None) -> Any:  # on a CPU: oneDNN's copy, of as many bytes
        with simulation.kind("packed weights"):
            copy = weight.clone()
        return lambda x: x @ copy.T

    with (
        named(KVCache, "resize", "KV cache"),
        named(Batch, "_verify", "logits"),
        named(Batch, "_draft", "logits"),
        patch.object(linear, "_packed", packed),
    ):
        yield
