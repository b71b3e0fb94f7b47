"""Any checkpoint as a model of lm-evaluation-harness, for what a fine-tune forgets: `--model wmtp`.

    python -m wmtp.eval.lm_eval_model run --model wmtp --model_args pretrained=runs/x/export --tasks arc_easy,wikitext

The harness is no dependency of the project: `pip install lm_eval==0.4.13`. Likelihoods are those that its own `hf`
model gives for the exported folder; texts may be decoded with all heads (`num_drafts`).
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from wmtp.errors import UserError, clear_errors
from wmtp.generation import DecodingStats, Request, Sampling, generate
from wmtp.loss.target_logits import chunked_logits
from wmtp.models import from_checkpoint, load_checkpoint
from wmtp.pretrained import hf_tokenizer, model_tags, resolve_checkpoint

try:
    import lm_eval.models  # noqa: F401  # its own are registered now, or never: a registry with one entry passes for full
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    line = f"lm-evaluation-harness cannot be imported ({error}); pip install lm_eval==0.4.13"
    raise SystemExit(line) if __name__ == "__main__" else UserError(line) from error

_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
# Names of one thing, of which the first wins.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_CHUNK = 1024  # rows of logits at once
_PAD = 0  # any id: what stands behind a text is never read
Scored = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context, continuation


@register_model("wmtp")
class WMTPModel(TemplateLM):
    """A decoder with heads, asked by lm-eval's tasks.

    Args:
        pretrained: a checkpoint in any form that :func:`~wmtp.pretrained.resolve_checkpoint` takes.
        tokenizer: its folder; by default the checkpoint's.
        dtype: fp32 or bf16.
        device: cpu, cuda, or auto; without a CUDA device, the CPU computes whatever is asked.
        batch_size: rows at once.
        max_length: the context; by default the checkpoint's.
        num_drafts: 0 decodes with head 1; up to H - 1, the other heads draft for it: greedy texts are the same.
        seed: of sampled texts.
        max_batch_size: taken because the harness gives it; only `auto` batch sizes need it.

    Raises:
        UserError: no such checkpoint, or an argument out of its range.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        dtype: str = "fp32",
        device: str = "auto",
        batch_size: int | str = 1,
        max_length: int | None = None,
        num_drafts: int = 0,
        seed: int = 0,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            raise UserError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
        path = resolve_checkpoint(pretrained)
        with torch.device("meta"):
            model = from_checkpoint(path, max_seq_len=max_length).to(_DTYPES[dtype])
        if not 0 <= num_drafts < model.num_future_tokens:
            raise UserError(
                f"num_drafts must be 0 to {model.num_future_tokens - 1}, one less than {pretrained} has heads, got "
                f"{num_drafts}"
            )
        there = torch.cuda.is_available()
        if device.startswith("cuda") and not there:  # which the harness' command line asks for unasked
            logging.getLogger(__name__).warning(f"no CUDA device is there for device={device}; the CPU computes")
        self._device = torch.device("cpu" if not there else "cuda" if device == "auto" else device)
        self._tokens = hf_tokenizer(path if tokenizer is None else tokenizer)
        self.tokenizer = self._tokens.hf
        load_checkpoint(model, path, device=self._device)
        self._model, self._path = model.requires_grad_(False).eval(), path
        self.batch_size, self.max_length = int(batch_size), model.max_seq_len
        self._num_drafts, self._seed = num_drafts, seed
        self.stats = DecodingStats()  # of all texts

    # ------------------------------------------------------------------------------------------------------------------
    # Texts and ids, as the harness' own models have them

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokens.eos_id if self._tokens.bos_id is None else self._tokens.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self._path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the ids of a text; by default with the BOS that the tokenizer adds, where the text has none."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as the text that the tokenizer's template makes of it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict:
        """Returns what identifies the model in the harness' results: the hash of its files, the run that made it."""
        return {"model_num_heads": self._model.num_future_tokens, **model_tags(Path(self._path))}

    # ------------------------------------------------------------------------------------------------------------------
    # Likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns of each continuation its log-likelihood in nats, and whether greedy decoding would write it."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for start in tqdm(range(0, len(order), self.batch_size), desc="likelihoods", disable=disable_tqdm):
            batch = order[start : start + self.batch_size]
            for index, answer in zip(batch, self._score([requests[i][1:] for i in batch]), strict=True):
                found[index], texts = answer, requests[index][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    @torch.inference_mode()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Scores one batch; a context that is too long loses its beginning."""
        for _, continuation in pairs:
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(f"a continuation has {len(continuation)} tokens, of 1 to max_length {self.max_length}")
        # The harness moves a context's last spaces into the continuation: of one of spaces alone nothing is left.
        first = [self.prefix_token_id]
        rows = [((context or first) + continuation)[-(self.max_length + 1) :] for context, continuation in pairs]
        width = max(map(len, rows)) - 1
        tokens = torch.tensor([row[:-1] + [_PAD] * (width - len(row) + 1) for row in rows])
        counts = [len(continuation) for _, continuation in pairs]
        # The token at place t is predicted at t - 1, in a row without its last token.
        place = [
            number * width + t
            for number, (row, count) in enumerate(zip(rows, counts, strict=True))
            for t in range(len(row) - 1 - count, len(row) - 1)
        ]
        label = torch.tensor([token for _, continuation in pairs for token in continuation], device=self._device)
        ce, greedy = self._model(
            tokens.to(self._device),
            num_heads=1,
            loss_fn=_of_labels,
            place=torch.tensor(place, device=self._device),
            label=label,
        )
        parts = zip(ce.double().split(counts), greedy.split(counts), strict=True)
        return [(-part.sum().item(), bool(best.all())) for part, best in parts]

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Returns each text's whole log-likelihood in nats, in windows of the context: every token is scored once."""
        windows: list[Scored] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            cut = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(pair)) for pair in cut]
            owners += [number] * (len(windows) - len(owners))
        scores: list[list[float]] = [[] for _ in requests]
        for number, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            scores[number].append(score)
        totals = list(map(math.fsum, scores))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ------------------------------------------------------------------------------------------------------------------
    # Texts

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Returns the texts that follow the contexts, up to a stop string; sampled where the task says so."""
        texts = [""] * len(requests)
        by_sampling: dict[Sampling, list[int]] = {}
        for index, request in enumerate(requests):
            by_sampling.setdefault(_sampling(request.args[1]), []).append(index)
        progress = tqdm(total=len(requests), desc="texts", disable=disable_tqdm)
        for sampling, indices in by_sampling.items():
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks {sampling.max_new_tokens} leaves no room in max_length {self.max_length}"
                )
            asked = [Request(i, tuple(self.tok_encode(requests[i].args[0])[-room:]), (self._seed, i)) for i in indices]
            for done in generate(
                self._model, self._tokens, asked, sampling,
                batch_size=self.batch_size, num_drafts=self._num_drafts, stats=self.stats,
            ):  # fmt: skip
                assert isinstance(done.id, int)
                texts[done.id] = done.text
                self.cache_hook.add_partial("generate_until", requests[done.id].args, done.text)
                progress.update()
        progress.close()
        return texts


def _of_labels(
    hidden: Tensor, unembedding: Tensor, *, place: Tensor, label: Tensor, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Computes CE in nats [N], and whether the label is the likeliest token [N], at places in hidden [1*B*S, D]."""
    chunks = [
        (torch.nn.functional.cross_entropy(logits, label[part], reduction="none"), logits.argmax(-1) == label[part])
        for part, _, logits in chunked_logits(hidden, unembedding, place, _CHUNK)
    ]
    ce, greedy = zip(*chunks, strict=True)
    return torch.cat(ce), torch.cat(greedy)


def _sampling(asked: dict[str, Any]) -> Sampling:
    """Returns a task's generation_kwargs as what decodes here; refuses what has no place in it."""
    kwargs = {name: value for name, value in asked.items() if value is not None}
    until = kwargs.pop("until", [])
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    lengths = [kwargs.pop(name) for name in _LENGTHS if name in kwargs]
    do_sample = kwargs.pop("do_sample", float(kwargs.get("temperature", 0)) > 0)
    temperature, top_p = float(kwargs.pop("temperature", 1)), float(kwargs.pop("top_p", 1))
    for name, neutral in (("top_k", 0), ("min_p", 0), ("repetition_penalty", 1), ("num_beams", 1)):
        if kwargs.get(name) == neutral or (name in ("top_k", "min_p") and not do_sample):
            kwargs.pop(name, None)
    if kwargs:
        name, value = next(iter(kwargs.items()))
        raise UserError(f"generation_kwargs has {name}={value!r}, which decoding here does not know; leave it out")
    return Sampling(int(lengths[0]) if lengths else 256, temperature if do_sample else 0.0, top_p, stop)


@clear_errors()
def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
