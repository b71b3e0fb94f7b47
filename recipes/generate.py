"""Text from a model, plain or self-speculative: of one prompt, or of a file of prompts and chats.

    python recipes/generate.py --config configs/smollm2_135m/generate.yaml 'prompt="def add(a, b):"'
    python recipes/generate.py --config configs/smollm2_135m/generate.yaml prompt="Reverse a string." chat=true
    python recipes/generate.py --config configs/smollm2_135m/generate.yaml prompts=prompts.jsonl output=texts.jsonl
    python recipes/generate.py --config configs/smollm2_135m/generate.yaml prompt=import show=heads page=heads.html

The text goes to standard output as it grows, what is said about it to standard error. Greedy text does not depend on
`num_drafts`; sampled text has the same distribution.
"""

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import wmtp  # noqa: F401  # isort: skip  # first: it silences what torchtune says when it is imported
import torch
from omegaconf import DictConfig

from wmtp import config
from wmtp.config import ConfigError, ConfigReader, build
from wmtp.data.conversations import conversation_of, spoken
from wmtp.data.rows import read_rows, take
from wmtp.distributed import start_world
from wmtp.errors import ExistsError, UserError, clear_errors
from wmtp.files import require_file, write_whole
from wmtp.generation import DecodingStats, Request, Sampling, Step, generate
from wmtp.generation.requests import check_request
from wmtp.generation.text import TextStream
from wmtp.models import load_checkpoint
from wmtp.pretrained import resolve_checkpoint
from wmtp.report.decoding import decoding_html, step_line, step_marks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class GenerateRecipe:
    """Order of events: read the config, `setup` (prompts, then the model), `generate`, `report`."""

    def __init__(self, cfg: DictConfig) -> None:
        """Reads and checks every key; nothing is built or written yet."""
        read = ConfigReader(cfg)
        self._prompt = read.get("prompt", None)
        self._prompts_file = read.text("prompts", None)
        self._chat = read.flag("chat", False)
        self._template = {"arguments": read.plain("template_arguments", None), "date": read.text("date", None)}
        self._checkpoint = read.get("checkpoint", None)
        self._model_cfg = read.section("model")
        self._tokenizer_cfg = read.section("tokenizer")
        self._device_name = read.choice("device", {"cpu": "cpu", "cuda": "cuda", "auto": "auto"}, "auto")
        self._dtype = read.choice("dtype", DTYPES, "fp32")
        self._seed = read.integer("seed", 0)
        self._num_samples = read.integer("num_samples", 1, minimum=1)
        self._sampling = Sampling(
            read.integer("max_new_tokens", 256, minimum=1),
            read.number("temperature", 0.0, minimum=0),
            read.number("top_p", 1.0, above=0, maximum=1),
            tuple(read.plain("stop", [])),
        )
        self._num_drafts = read.integer("num_drafts", None)
        self._batch_size = read.integer("batch_size", 1, minimum=1)
        self._compile = read.flag("compile", False)
        self._show_heads = read.choice("show", {"heads": True, None: False}, None)
        self._page = read.text("page", None)
        self._output = read.text("output", None)
        self._overwrite = read.flag("overwrite", False)
        read.done()

        if not isinstance(self._prompt, str | None):
            raise ConfigError(f"prompt must be a text, got {self._prompt!r:.60}; quote it twice: 'prompt=\"...\"'")
        if (self._prompt is None) == (self._prompts_file is None):
            raise ConfigError("set one of prompt=TEXT and prompts=FILE")
        for key, name in (("output", self._output), ("page", self._page)):
            if name is not None:
                require_file(Path(name), key)
            if name is not None and Path(name).exists() and not self._overwrite:
                raise ExistsError(f"{key}={name} is there already; name another file, or set overwrite=true")
        if self._page is not None and not self._show_heads:
            raise ConfigError("page=FILE shows what the heads proposed; set show=heads too")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError("generate runs as one process: use --nproc_per_node 1")

    def setup(self) -> None:
        """Builds everything in the order in which a mistake is cheapest to find: prompts, then the model."""
        world = start_world(self._device_name)
        path = None if self._checkpoint is None else resolve_checkpoint(self._checkpoint)
        self._tokenizer = build(self._tokenizer_cfg, where="tokenizer")
        self._asked = dict(self._read_prompts())  # by id: the text or messages, and the token ids
        if not self._asked:
            raise ConfigError(f"prompts={self._prompts_file} has no rows; give it one for each prompt")
        torch.manual_seed(self._seed)
        with torch.device("cpu" if path is None else "meta"):
            self._model = build(self._model_cfg, where="model").to(self._dtype)
        if self._tokenizer.vocab_size > self._model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self._tokenizer.vocab_size} ids, the model {self._model.vocab_size}; "
                "use the tokenizer of the model's checkpoint"
            )
        drafts = self._model.num_future_tokens - 1
        self._num_drafts = drafts if self._num_drafts is None else self._num_drafts
        if self._num_drafts > drafts:
            raise ConfigError(f"num_drafts must be at most the model's {drafts} extra heads, got {self._num_drafts}")
        if self._show_heads and not self._num_drafts:
            raise ConfigError("show=heads needs drafts: num_drafts >= 1, and a model with extra heads")
        self._requests = [
            Request((name, sample), tuple(ids), (self._seed, name, sample))
            for name, (_, ids) in self._asked.items()
            for sample in range(self._num_samples)
        ]
        for request in self._requests:
            check_request(request, self._model)
        if path is None:
            print("checkpoint=null: the model's weights are random", file=sys.stderr)
            self._model.to(world.device)
        else:
            load_checkpoint(self._model, path, device=world.device, log=lambda line: print(line, file=sys.stderr))
        self._model.requires_grad_(False).eval()

    def _read_prompts(self):
        """Yields (id, (prompt or messages, token ids)) of what is to be continued."""
        rows: Any = read_rows(self._prompts_file) if self._prompt is None else [("prompt", {"prompt": self._prompt})]
        seen = set()
        for number, (where, row) in enumerate(rows):
            name = str(number if row.get("id") is None else row["id"])
            if name in seen:
                raise UserError(f"{where}: id {name!r} is there twice; give each prompt its own, or none an id")
            seen.add(name)
            if row.get("messages") is None and row.get("conversations") is None:
                text = take(row, where, "prompt", str)
                if not self._chat:
                    yield name, (text, self._tokenizer.encode_prompt(text))
                    continue
                row = {"messages": [{"role": "user", "content": text}]}
            _, messages, tools = conversation_of(row, where)
            ids = self._tokenizer.chat.prompt(spoken(messages), tools, where=where, **self._template)
            yield name, (messages, ids)

    # ------------------------------------------------------------------------------------------------------------------
    # Generation

    def generate(self) -> None:
        """Generates every text, shows it as it grows, or as it ends where several grow at once, and keeps it."""
        ends = {self._tokenizer.eos_id, *(self._model.source.end_ids if self._model.source else ())}
        self._streams = {r.id: TextStream(self._tokenizer, self._sampling.stop, ends) for r in self._requests}
        self._steps: dict[Any, list[Step]] = {request.id: [] for request in self._requests}
        self._stats, self._colour = DecodingStats(), sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        if self._show_heads:
            print(f"forward, drafts of heads 2 and on ({step_marks()}), → head 1's own token", file=sys.stderr)
        self._on_screen = None  # the text that was shown last
        with ExitStack() as opened:
            output = None
            if self._output is not None:
                Path(self._output).parent.mkdir(parents=True, exist_ok=True)
                output = opened.enter_context(open(self._output, "w", encoding="utf-8"))
            for done in generate(
                self._model, self._tokenizer, self._requests, self._sampling,
                batch_size=self._batch_size, num_drafts=self._num_drafts,
                compile=self._compile, stats=self._stats, watch=self._watch,
            ):  # fmt: skip
                if self._batch_size > 1:
                    self._show(done.id, self._steps[done.id])
                print(self._streams[done.id].end(done.text), flush=True)
                if output is not None:
                    (name, sample), prompt = done.id, self._asked[done.id[0]][0]
                    row = {"id": name, "sample": sample, "prompt" if isinstance(prompt, str) else "messages": prompt}
                    row |= {"text": done.text, "finish_reason": done.finish_reason}
                    row |= {"new_tokens": len(done.tokens), "forwards": done.forwards}
                    output.write(json.dumps(row, ensure_ascii=False) + "\n")
                    output.flush()

    def _watch(self, id: Any, step: Step) -> None:
        self._steps[id].append(step)
        if self._batch_size == 1:
            self._show(id, [step])

    def _show(self, id: Any, steps: list[Step]) -> None:
        """Shows the newest steps of a text, under its name where there are several."""
        if len(self._requests) > 1 and self._on_screen != id:
            print(f"== {id[0]}" + f", sample {id[1]}" * (self._num_samples > 1))
        self._on_screen = id
        for number, step in enumerate(steps, len(self._steps[id]) - len(steps) + 1):
            if self._show_heads:
                print(step_line(self._tokenizer, number, step, colour=self._colour), flush=True)
            else:
                print(self._streams[id].add(step.tokens), end="", flush=True)

    def report(self) -> None:
        """Says how fast it was, and writes the page."""
        stats = self._stats
        seconds = stats.prefill_seconds + stats.decode_seconds
        shares = [f"head {k} {share:.0%}" for k, share in stats.acceptance().items()]
        said = (
            f"{stats.new_tokens} tokens in {seconds:.1f} s: {stats.new_tokens / max(seconds, 1e-9):.1f} tokens/s, "
            f"{stats.tokens_per_forward:.2f} tokens per forward"
        )
        print(said + (f"; accepted: {', '.join(shares)}" if shares else ""), file=sys.stderr)
        if self._page is not None:
            texts = {}
            for (name, sample), steps in self._steps.items():
                asked, ids = self._asked[name]
                prompt = asked if isinstance(asked, str) else self._tokenizer.decode(ids)
                label = name if self._num_samples == 1 else f"{name}, sample {sample}"
                texts[label] = prompt, steps
            settings = {"checkpoint": self._checkpoint, "num_drafts": self._num_drafts, "speed": said}
            settings |= {"temperature": self._sampling.temperature, "top_p": self._sampling.top_p, "seed": self._seed}
            page = decoding_html(texts, self._tokenizer, title="What each head proposed", settings=settings)
            write_whole(Path(self._page), page)
            print(f"wrote {self._page}", file=sys.stderr)


@clear_errors()
@config.parse
def main(cfg: DictConfig) -> None:
    recipe = GenerateRecipe(cfg)
    recipe.setup()
    recipe.generate()
    recipe.report()


if __name__ == "__main__":
    main()
