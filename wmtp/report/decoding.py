"""Self-speculative decoding to look at: what each head proposed and what was accepted, in a terminal and as a page."""

from collections.abc import Mapping, Sequence
from importlib.resources import files

from wmtp.generation import Step
from wmtp.report.token_weights import escaped, token_html, token_page
from wmtp.report.tokens import token_pieces

# Of a draft: its mark, its words, the terminal's code and the page's class. None rests on its colour alone.
_ACCEPTED, _REFUSED, _UNSEEN = (
    ("✓", "accepted", "32", "a"),
    ("✗", "refused", "31", "r"),
    ("·", "not compared", "2", "n"),
)


def step_line(tokenizer, number: int, step: Step, *, colour: bool) -> str:
    """Returns a forward in one line: each draft with its head and mark, then head 1's own token.

        12  ✓2 ' a'  ✗3 ' -'  ·4 ' b'  → ' +'

    Args:
        colour: of a terminal, by ANSI codes.
    """
    paint = lambda text, code: f"\x1b[{code}m{text}\x1b[0m" if colour else text
    parts = [f"{number:>6}"]
    for i, token in enumerate(step.drafts):
        mark, _, code, _ = _verdict(step, i)
        parts.append(paint(f"{mark}{i + 2} {_shown(tokenizer, token)}", code))
    parts += [paint(f"→ {_shown(tokenizer, token)}", "1") for token in step.tokens[step.accepted :]]
    return "  ".join(parts)


def decoding_html(
    texts: Mapping[str, tuple[str, Sequence[Step]]], tokenizer, *, title: str, settings: Mapping[str, object]
) -> str:
    """Returns a self-contained HTML page, without scripts or network: each text, and a table of its forwards.

    A token that a draft gave is shaded, underlined and numbered by its head; head 1's own are plain. In the table a
    draft is accepted, refused or not compared, by mark and colour. Pointing at a token or a row marks its forward.

    Args:
        texts: id to the prompt and the steps of its decoding, at least one.
        settings: name to value, listed above the texts.
    """
    heads = 1 + max(len(step.drafts) for _, steps in texts.values() for step in steps)
    forwards = max(len(steps) for _, steps in texts.values())
    key = "".join(f"<li><b class=h{k}>head {k}</b></li> " for k in range(2, heads + 1))
    sections = "".join(_section(name, *text, tokenizer, heads) for name, text in texts.items())
    legend = (
        f"<div class=legend><ol>{key}</ol><div class=key>A numbered token is that head&#8217;s draft, which "
        "head 1 agreed with; head 1&#8217;s own are plain, the prompt is grey. In the tables: "
        f"{step_marks()}.</div></div>\n"
    )
    return token_page(title, settings, _style(heads, forwards), legend, sections)


def step_marks() -> str:
    """Returns what the marks of :func:`step_line` mean."""
    return ", ".join(f"{mark} {words}" for mark, words, *_ in (_ACCEPTED, _REFUSED, _UNSEEN))


def _verdict(step: Step, draft: int) -> tuple[str, str, str, str]:
    return _ACCEPTED if draft < step.accepted else _REFUSED if draft == step.accepted else _UNSEEN


def _shown(tokenizer, token: int) -> str:
    return repr(tokenizer.decode([token]))


def _section(name: str, prompt: str, steps: Sequence[Step], tokenizer, heads: int) -> str:
    tokens = [token for step in steps for token in step.tokens]
    pieces = iter(token_pieces(tokenizer, tokens))
    cell = lambda token: escaped(_shown(tokenizer, token))
    code, rows = [f"<b>{token_html(prompt)}</b>"], []
    for number, step in enumerate(steps, 1):
        for i in range(len(step.tokens)):
            head = i + 2 if i < step.accepted else 1
            about = f'class="h{head} f{number}" title="forward {number}, head {head}"'
            code.append(f"<b {about}>{token_html(next(pieces))}</b>")
        cells = ""
        for i, draft in enumerate(step.drafts):
            mark, words, _, kind = _verdict(step, i)
            cells += f"<td class={kind}><i title='{words}'>{mark}</i> {cell(draft)}"
        cells += "<td>" * (heads - 1 - len(step.drafts))
        own = "".join(map(cell, step.tokens[step.accepted :]))
        rows.append(f"<tr class=f{number}><th scope=row>{number}{cells}<td>{own}\n")
    columns = "".join(f"<th scope=col>head {k}" for k in range(2, heads + 1))
    return (
        f"<section>\n<header><h2>{escaped(name)}</h2><small>{len(tokens)} tokens in {len(steps)} forwards: "
        f"{len(tokens) / len(steps):.2f} a forward</small></header>\n<article><pre>{''.join(code)}</pre></article>\n"
        f"<table><thead><tr><th scope=col>forward{columns}<th scope=col>head 1<tbody>\n{''.join(rows)}</table>\n"
        "</section>\n"
    )


def _style(heads: int, forwards: int) -> str:
    rules = ["\n", files("wmtp.report").joinpath("decoding.css").read_text(encoding="utf-8")]
    lines = ("solid", "double", "dotted", "dashed")
    for k in range(2, heads + 1):
        shade = 0.15 + 0.45 * (k - 2) / max(heads - 2, 1)
        look = f"background: rgba(var(--low), {shade:.2f}); border-bottom: 3px {lines[(k - 2) % 4]};"
        rules.append(f'.h{k} {{ {look} }}\n.h{k}::before {{ content: "{k}" !important; }}\n')
    chosen = ",".join(f"section:has(.f{n}:hover) .f{n}" for n in range(1, forwards + 1))
    return "".join(rules) + (f"{chosen} {{ outline: 2px solid; }}\n" if chosen else "")
