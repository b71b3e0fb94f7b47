"""A page of HTML that shows code with each token shaded by its weight, one column for each method."""

import html
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from importlib.resources import files

import numpy as np
import torch

from wmtp.report.token_views import TokenView
from wmtp.weighting.statistics import weight_statistics

# Classes of weights, each from its lower bound to that of the next: a fixed scale, symmetric in log(weight) about 1, so
# that pages of different steps and methods can be compared. The class of weight 1 has no colour.
_SCALE = (
    ("w0", "0", 0.0, "low", 0.70),
    ("w1", "under ¼", math.ulp(0.0), "low", 0.50),
    ("w2", "¼ to ½", 1 / 4, "low", 0.33),
    ("w3", "½ to 0.9", 1 / 2, "low", 0.16),
    ("w4", "0.9 to 1.1", 0.9, None, 0.0),
    ("w5", "1.1 to 2", 1.1, "high", 0.25),
    ("w6", "2 to 4", 2.0, "high", 0.50),
    ("w7", "4 and more", 4.0, "high", 0.80),
)
_BOUNDS = np.array([lowest for _, _, lowest, _, _ in _SCALE])
# Characters that reorder the text around them: code must appear in the order of its tokens.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def token_weights_html(documents: Sequence[TokenView], *, title: str, settings: dict | None = None) -> str:
    """Returns a self-contained HTML page, without scripts or network, as artifact viewers require.

    Each document has a column for each method, its tokens shaded from blue (weight below 1) to orange (above); tokens
    without a loss are grey. Pointing at a token marks it in every column and shows its position, id, text, weights and
    signals; a switch shows these numbers for all tokens, others hide methods. The text of a document's `<pre>` is its
    code. Characters that HTML cannot hold, or that are invisible (controls, surrogates, changes of writing direction),
    are escaped, as in ``\\x00``.

    Args:
        documents: all with the same methods and signals, in the same order.
        title: of the page.
        settings: name to value, listed above the documents (a step, a run, a method's arguments).

    Raises:
        ValueError: no documents, or documents whose methods or signals differ.
    """
    if not documents:
        raise ValueError("token_weights_html got no documents; give at least one TokenView")
    methods, signals = list(documents[0].weights), list(documents[0].signals)
    for document in documents:
        for kind, expected, got in (("weights", methods, document.weights), ("signals", signals, document.signals)):
            if list(got) != expected:
                raise ValueError(
                    f"document {document.id} has {kind} {list(got)}, the first document {documents[0].id} has "
                    f"{expected}; show the same for every document of a page"
                )
    longest = max(len(document.pieces) for document in documents)
    switches = "".join(
        f"<input type=checkbox id=m{n} checked><label for=m{n}>{escaped(method)}</label>\n"
        for n, method in enumerate(methods)
    )
    switches += "<input type=checkbox id=numbers><label for=numbers>numbers of all tokens</label>\n"
    sections = "".join(map(_section, documents))
    return token_page(title, settings or {}, _style(len(methods), longest), f"{_LEGEND}{switches}", sections)


def read_token_weights(page: str) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """Returns what a page of :func:`token_weights_html` shows: document to method to (class, text) of its tokens.

    The class is one of :func:`scale`'s, "" for a token without a loss.
    """
    classes = {name for name, *_ in _SCALE}
    documents: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for section in page.split("<section>")[1:]:  # names and texts are escaped, so every tag is the page's own
        columns = documents.setdefault(html.unescape(section.split("<h2>")[1].split("</h2>")[0]), {})
        for method, code in re.findall(r"<h3>(.*?)</h3>.*?<pre>(.*?)</pre>", section, flags=re.DOTALL):
            tokens = re.findall(r'<b class="?([^>"]*)"?>(.*?)</b>', code, flags=re.DOTALL)
            columns[html.unescape(method)] = [
                ("".join(classes & set(of.split())), html.unescape(re.sub(r"<.*?>", "", text))) for of, text in tokens
            ]
    return documents


def scale() -> list[tuple[str, str, str, float]]:
    """Returns the classes of weights: name, range in words, the variable of its colour ("" for none), opacity."""
    return [(name, label, side or "", opacity) for name, label, _, side, opacity in _SCALE]


def _section(document: TokenView) -> str:
    """Returns one document: a head, a column for each method, and the table of the tokens' numbers."""
    targets = int(np.asarray(document.is_target, dtype=bool).sum())
    texts = [token_html(piece) for piece in document.pieces]
    columns = "".join(_column(document, n, method, texts) for n, method in enumerate(document.weights))
    head = "".join(f"<th>{escaped(name)}" for name in (*document.weights, *document.signals))
    rows = []
    for i, (piece, token) in enumerate(zip(document.pieces, document.tokens, strict=True)):
        weights = [w[i] if document.is_target[i] else math.nan for w in document.weights.values()]
        cells = "".join(f"<td>{_number(x)}" for x in (*weights, *(s[i] for s in document.signals.values())))
        rows.append(f"<tr class=t{i}><td>{i}<td>{int(token)}<td>{escaped(repr(piece))}{cells}\n")
    return (
        f"<section>\n<header><h2>{escaped(document.id)}</h2>"
        f"<small>{len(texts)} tokens, {targets} targets</small></header>\n<div class=columns>\n{columns}</div>\n"
        f"<table><thead><tr><th>position<th>id<th>token{head}<tbody>\n{''.join(rows)}</table>\n</section>\n"
    )


def _column(document: TokenView, number: int, method: str, texts: list[str]) -> str:
    of_targets = document.target_weights(method)
    statistics = "no target"
    if of_targets.size:
        s = weight_statistics(torch.from_numpy(of_targets))
        statistics = (
            f"kept {s['kept_share']:.0%}, max {s['max']:.3g}, effective sample size {s['effective_sample_size']:.0%}"
        )
    tokens = []
    for i, (text, token, is_target) in enumerate(zip(texts, document.tokens, document.is_target, strict=True)):
        classes = [f"t{i}"]
        if is_target:
            classes.append(_SCALE[np.searchsorted(_BOUNDS, document.weights[method][i], side="right") - 1][0])
        if int(token) in document.special_ids:
            classes.append("z")
        attribute = classes[0] if len(classes) == 1 else f'"{" ".join(classes)}"'
        tokens.append(f"<b class={attribute}>{text}</b>")
    return (
        f"<article class=m{number}><h3>{escaped(method)}</h3><div class=s>{statistics}</div>"
        f"<pre>{''.join(tokens)}</pre></article>\n"
    )


def _style(methods: int, longest: int) -> str:
    """Returns the rules for the scale, the number of methods and the longest document."""
    rules = []
    for name, _, _, side, opacity in _SCALE:
        if side is not None:
            rules.append(f".{name} {{ background: rgba(var(--{side}), {opacity}); }}\n")
    for n in range(methods):
        rules.append(f"#m{n}:not(:checked) ~ main .m{n} {{ display: none; }}\n")
    for rows, look in (("pre .t", "outline: 2px solid"), ("tr.t", "display: table-row")):
        chosen = ",".join(f"section:has(.t{i}:hover) {rows}{i}" for i in range(longest))
        rules.append(f"{chosen} {{ {look}; }}\n")
    return "".join(rules)


def _legend() -> str:
    steps = "".join(f"<li><b class={name}></b><span>{label}</span>" for name, label, *_ in _SCALE)
    return (
        f"<div class=legend><ol>{steps}</ol><div class=key>A target token is shaded by its weight, 1 being plain "
        "training; grey text is no target.<br>&#8629; a line&#8217;s end, &#9702; the first bytes of the next "
        "token&#8217;s character. Point at a token for its numbers.<div class=old>This browser does not know the CSS "
        "selector :has, so pointing shows nothing: switch the numbers of all tokens on.</div></div></div>\n"
    )


_LEGEND = _legend()


def token_page(title: str, settings: Mapping[str, object], style: str, above: str, sections: str) -> str:
    """Returns a page of tokens; ``style`` is added to the sheet of all such pages."""
    sheet = files("wmtp.report").joinpath("token_weights.css").read_text(encoding="utf-8")
    listed = "".join(f"<div><dt>{escaped(k)}<dd>{escaped(v)}</div>" for k, v in settings.items())
    return (
        "<!DOCTYPE html>\n<html lang=en>\n<meta charset=utf-8>\n"
        f'<meta name=viewport content="width=device-width, initial-scale=1">\n<title>{escaped(title)}</title>\n'
        f"<style>\n{sheet}{style}</style>\n<body>\n<h1>{escaped(title)}</h1>\n<dl>{listed}</dl>\n"
        f"{above}<main>\n{sections}</main>\n</body>\n</html>\n"
    )


def token_html(piece: str) -> str:
    """Returns a token's text as HTML: markup and invisible characters escaped, line ends marked."""
    parts = []
    for character in piece:
        if character == "\n":
            parts.append("<u></u>\n")
        elif character == "\r":  # an HTML parser turns a plain one into a line feed
            parts.append("<u></u>&#13;")
        elif character != "\t" and (unicodedata.category(character) in ("Cc", "Cs") or character in _REORDERING):
            parts.append(f"<s>{ascii(character)[1:-1]}</s>")
        else:
            parts.append(html.escape(character, quote=False))
    return "".join(parts)


def escaped(value) -> str:
    """Returns a name or setting as HTML on one line."""
    return html.escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value)), quote=False)


def _number(value: float) -> str:
    return "&#8211;" if math.isnan(value) else f"{value:.4g}"
