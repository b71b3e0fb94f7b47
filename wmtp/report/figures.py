"""Figures as SVG for a page: their colours are the page's, so they follow its theme; equal data give equal bytes.

Colour never stands alone: lines differ by dashes and markers too, areas by hatches, and names stand beside what they
name. Text stays text.
"""

import html
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.lines
import matplotlib.patches
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours that stand in the SVG for CSS variables of the page.
INK, QUIET, LINE, PAGE = "#0f0f01", "#0f0f02", "#0f0f03", "#0f0f04"
_VARIABLES = {INK: "ink", QUIET: "quiet", LINE: "line", PAGE: "page"}
_SERIES = {f"#0f0f1{n}": f"s{n}" for n in range(1, 9)}
_VARIABLES |= _SERIES
_MARKERS, _HATCHES = "osD^vPX*", ("", "///", "--", "\\\\\\", "xx", "||", "++", "//")
_DASHES = ((0, (4, 2)), "-", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), "-", (0, (3, 1)), (0, (1, 2.5)), (0, (8, 2)))
_WIDTH = 7.4  # inches; the page scales it
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "wmtp", "text.parse_math": False, "font.size": 9, "axes.titlesize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": LINE, "axes.labelcolor": QUIET,
    "axes.titlecolor": INK, "axes.titlelocation": "left", "text.color": INK, "xtick.color": LINE, "ytick.color": LINE,
    "xtick.labelcolor": QUIET, "ytick.labelcolor": QUIET, "axes.facecolor": "none", "figure.facecolor": "none",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.5, "hatch.linewidth": 0.6,
    "hatch.color": PAGE, "lines.linewidth": 1.6, "legend.frameon": False, "axes.formatter.useoffset": False,
}  # fmt: skip
LONGEST_LABEL = 24


@dataclass(frozen=True)
class Look:
    """How a cell is drawn in every figure of a page."""

    color: str
    marker: str
    dash: Any
    hatch: str


@dataclass(frozen=True)
class Curve:
    """A line with a band: x, mean, low and high, of equal length."""

    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Returns a look for each of up to eight names; the first, a baseline, has the text's colour."""
    colors = [INK, *_SERIES]
    kinds = zip(names, colors, _MARKERS, _DASHES, _HATCHES, strict=False)
    return {name: Look(color, marker, dash, hatch) for name, color, marker, dash, hatch in kinds}


def short(label: str) -> str:
    """Returns a label with the keys of a grid's cell, as in strength-0.3, by first letters, or cut in its middle."""
    if len(label) > LONGEST_LABEL:
        label = re.sub(r"(?<![A-Za-z])([A-Za-z])[A-Za-z.]*-(?=[\d.])", r"\1", label)
    half = (LONGEST_LABEL - 1) // 2
    return label if len(label) <= LONGEST_LABEL else f"{label[:half]}…{label[-half:]}"


@matplotlib.rc_context(_STYLE)
def curves(
    of: Mapping[str, Curve], named: Mapping[str, Look], *, x: str, y: str, label: str, zero: bool = False
) -> str:
    """Draws a line with its band for each named curve, named at its end, and thin lines for the others.

    Args:
        zero: draws the line of zero.
    """
    figure, ax = _figure(3.1)
    if zero:
        ax.axhline(0, color=QUIET, lw=1)
    for name in (name for name in of if name not in named):
        ax.plot(of[name].x, of[name].mean, color=QUIET, lw=0.7, alpha=0.35, zorder=1)
    ends = []
    for name, curve in of.items():
        if look := named.get(name):
            _line(ax, curve, look)
            ends.append((curve.x[-1], curve.mean[-1], name, look))
    ax.set(xlabel=x, ylabel=y)
    if not zero:
        _focus(ax, [value for curve in of.values() for value in curve.mean])
    return _svg(figure, ax, label, ends)


@matplotlib.rc_context(_STYLE)
def dots(of: Mapping[str, Curve], named: Mapping[str, Look], *, x: str, y: str, label: str) -> str:
    """Draws points with the ends of their range beside each other at each x, joined by thin lines."""
    figure, ax = _figure(3.1)
    every = sorted({x for curve in of.values() for x in curve.x})
    ends = []
    for place, (name, look) in enumerate((name, look) for name, look in named.items() if name in of):
        curve, shift = of[name], (place - (len(named) - 1) / 2) * 0.05
        at = [x + shift for x in curve.x]
        ax.plot(at, curve.mean, color=look.color, ls=look.dash, lw=0.8, marker=look.marker, ms=5)
        ax.vlines(at, curve.low, curve.high, color=look.color, lw=1.2)
        ends.append((at[-1], curve.mean[-1], name, look))
    ax.set_xticks(every)
    ax.set(xlabel=x, ylabel=y, xlim=(every[0] - 0.4, every[-1] + 0.4))
    return _svg(figure, ax, label, ends)


@matplotlib.rc_context(_STYLE)
def small_curves(panels: Mapping[str, Mapping[str, Curve]], named: Mapping[str, Look], *, x: str, label: str) -> str:
    """Draws a panel for each group of curves, two beside each other, with one key above all."""
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(_WIDTH, 0.5 + 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True).flat
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    handles: dict[str, Any] = {}
    for ax, (title, of) in zip(axes, panels.items(), strict=False):
        for name, curve in of.items():
            if look := named.get(name):
                handles[name] = _line(ax, curve, look)
        ax.set_title(title)
    figure.supxlabel(x, color=QUIET, fontsize=9)
    names = [short(name) for name in handles]
    figure.legend(handles.values(), names, loc="outside upper left", ncols=3, handlelength=3)
    return _svg(figure, None, label)


@matplotlib.rc_context(_STYLE)
def forest(rows: Sequence[tuple[str, float, float, float, bool]], *, x: str, label: str) -> str:
    """Draws differences with their intervals, a row (name, mean, low, high, found) each; hollow if not found."""
    figure, ax = _figure(0.7 + 0.21 * len(rows))
    ax.axvline(0, color=QUIET, lw=1)
    for place, (_, mean, low, high, found) in enumerate(rows):
        color = next(iter(_SERIES)) if found else QUIET
        ax.plot([low, high], [place, place], color=color, lw=1.6 if found else 1.0, solid_capstyle="butt")
        ax.plot(mean, place, marker="o", ms=5, color=color, mfc=color if found else PAGE)
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.set(xlabel=x, ylim=(len(rows) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    return _svg(figure, None, label)


@matplotlib.rc_context(_STYLE)
def scatter(points: Mapping[str, tuple[float, float]], named: Mapping[str, Look], front: Sequence[str] = (), *,
            x: str, y: str, label: str, zero: bool = False) -> str:  # fmt: skip
    """Draws a point for each cell, the named ones with their names; `front` is joined by steps."""
    figure, ax = _figure(3.1)
    if zero:
        ax.axhline(0, color=QUIET, lw=1)
    if front:
        ax.step(*zip(*(points[name] for name in front), strict=True), where="post", color=QUIET, lw=1, ls="--")
    ends = []
    for name, (px, py) in points.items():
        look = named.get(name)
        ax.plot(px, py, marker=look.marker if look else ".", ms=7 if look else 5, ls="", mec=PAGE, mew=0.5,
                color=look.color if look else QUIET, zorder=3 if look else 2)  # fmt: skip
        if look:
            ends.append((px, py, name, look))
    ax.set(xlabel=x, ylabel=y)
    ax.margins(0.08, 0.12)
    return _svg(figure, ax, label, ends)


@matplotlib.rc_context(_STYLE)
def heatmaps(panels: Mapping[str, np.ndarray], columns: Sequence[str], rows: Sequence[str], *,
             x: str, y: str, label: str, lower: bool = True) -> str:  # fmt: skip
    """Draws matrices [rows, columns] beside each other on one scale, with their numbers; the best has a frame.

    Args:
        lower: is better.
    """
    every = np.stack(list(panels.values()))
    low, high = np.nanmin(every), np.nanmax(every)
    palette = matplotlib.colormaps["viridis_r" if lower else "viridis"]
    per_row = min(3, len(panels))
    lines = -(-len(panels) // per_row)
    height = (0.75 + 0.34 * len(rows)) * lines + 0.3
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(lines, per_row, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (title, matrix) in zip(axes.flat, panels.items(), strict=False):
        for (row, column), value in np.ndenumerate(matrix):
            if np.isnan(value):
                ax.text(column, row, "\u2013", ha="center", va="center", color=QUIET)
                continue
            share = (value - low) / (high - low) if high > low else 0.5
            color = palette(share)
            best = value == (low if lower else high)
            ax.add_patch(matplotlib.patches.Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, fc=color,
                                                      ec=INK if best else "none", lw=2 if best else 0))  # fmt: skip
            dark = np.dot(color[:3], (0.299, 0.587, 0.114)) < 0.55
            ax.text(column, row, f"{value:.4f}", ha="center", va="center", fontsize=8,
                    color="#ffffff" if dark else "#000000", fontweight="bold" if best else "normal")  # fmt: skip
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows)
        ax.set(xlim=(-0.55, len(columns) - 0.45), ylim=(len(rows) - 0.45, -0.55), title=title)
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    figure.supxlabel(x, color=QUIET, fontsize=9)
    figure.supylabel(y, color=QUIET, fontsize=9)
    return _svg(figure, None, label)


@matplotlib.rc_context(_STYLE)
def shares(rows: Mapping[str, Mapping[str, float]], kinds: Sequence[str], *, x: str, label: str) -> str:
    """Draws a bar for each row, cut into the shares of kinds, which have hatches and, where there is room, numbers."""
    figure, ax = _figure(1.0 + 0.26 * len(rows))
    styles = dict(zip(kinds, looks(kinds).values(), strict=False))
    start = np.zeros(len(rows))
    for kind, look in styles.items():
        width = np.array([of.get(kind, 0.0) for of in rows.values()])
        color = list(_SERIES)[list(styles).index(kind)]
        ax.barh(range(len(rows)), width, left=start, height=0.72, color=color, hatch=look.hatch, edgecolor=PAGE,
                lw=0.8, label=kind)  # fmt: skip
        for place, (share, left) in enumerate(zip(width, start, strict=True)):
            if share >= 0.07:
                box = {"boxstyle": "round,pad=0.15", "fc": PAGE, "ec": "none"}
                ax.text(left + share / 2, place, f"{share:.0%}", ha="center", va="center", fontsize=7.5, bbox=box)
        start += width
    ax.set_yticks(range(len(rows)), [short(name) for name in rows])
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.set(xlabel=x, xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
    ax.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, 0))
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=4, handlelength=2.2, handleheight=1.1)
    return _svg(figure, None, label)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _line(ax: Axes, curve: Curve, look: Look) -> matplotlib.lines.Line2D:
    """Draws a curve over steps with its band; returns its line."""
    style = {"color": look.color, "ls": look.dash, "marker": look.marker, "ms": 4}
    (line,) = ax.plot(curve.x, curve.mean, markevery=max(1, len(curve.x) // 8), **style)
    ax.fill_between(curve.x, curve.low, curve.high, color=look.color, alpha=0.15, lw=0)
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    return line


def _focus(ax: Axes, values: Sequence[float]) -> None:
    """Keeps the first steps, which fall steeply, from pressing the rest into a line."""
    finite = np.array(values)[np.isfinite(values)]
    low, high = np.quantile(finite, (0, 0.9)) if len(finite) else (0.0, 0.0)
    if high > low:
        ax.set_ylim(low - 0.06 * (high - low), high + 0.25 * (high - low))


def _name_ends(figure: Figure, ax: Axes, ends: Sequence[tuple[float, float, str, Look]]) -> None:
    """Writes names into the right margin, apart from each other, each joined to the point that it names."""
    margin = (30 + 5.6 * max(len(short(name)) for _, _, name, _ in ends)) / 72 / _WIDTH
    figure.get_layout_engine().set(rect=(0, 0, 1 - margin, 1))  # type: ignore[union-attr, call-arg]
    figure.draw_without_rendering()
    to_figure = ax.transData + figure.transFigure.inverted()
    box = ax.get_position()
    points = [(*to_figure.transform((x, y)), name, look) for x, y, name, look in ends]
    points.sort(key=lambda point: -point[1])
    gap = 12 / 72 / figure.get_figheight()
    heights = [min(point[1], box.y1) for point in points]
    for i in range(1, len(heights)):
        heights[i] = min(heights[i], heights[i - 1] - gap)
    heights[-1] = max(heights[-1], box.y0)  # what fell below the axes rises again, and lifts what it meets
    for i in range(len(heights) - 1, 0, -1):
        heights[i - 1] = max(heights[i - 1], heights[i] + gap)
    for (x, y, name, look), height in zip(points, heights, strict=True):
        place = box.x1 + 0.035
        line = {"color": look.color, "lw": 0.6, "alpha": 0.6}
        figure.add_artist(
            matplotlib.lines.Line2D([x, box.x1 + 0.01, place - 0.006], [min(y, box.y1), height, height], **line)
        )
        figure.text(place, height, short(name), color=look.color, va="center", fontsize=9)


def _svg(figure: Figure, ax: Axes | None, label: str, ends: Sequence[tuple[float, float, str, Look]] = ()) -> str:
    """Returns the figure as an element of a page, its colours as variables, without names that clash with others."""
    if ax is not None and ends:
        _name_ends(figure, ax, ends)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg[svg.index("<svg") :], count=1, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' ?font-family: [^;"]*;', "", svg)
    svg = re.sub(r"(?<=font: )(.*?px) [^;\"]*", r"\1 inherit", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"<g id=\"(?!m[0-9a-f]{10})[^\"]*\">", "<g>", svg)
    for marker, style in dict(re.findall(r'<use xlink:href="#(\w+)"[^>]*style="([^"]*)"', svg)).items():
        # The style of a marker, once where it is defined and not at each of its places; bands are defined without one.
        svg, defined = re.subn(rf'(<path id="{marker}"[^>]*style=")[^"]*', rf"\g<1>{style}", svg)
        svg = re.sub(rf'(<use xlink:href="#{marker}"[^>]*?) style="[^"]*"', r"\1", svg) if defined else svg
    for _ in range(2):
        svg = re.sub(r"<g>\s*(<(?:use|path)[^>]*/>)\s*</g>", r"\1", svg)
    name, ids = f"f{zlib.crc32(label.encode()):08x}", dict[str, int]()

    def tag(found: re.Match) -> str:
        text = re.sub(r"(\d\.\d)\d+", r"\1", found[0])  # tenths of a point
        text = re.sub(r'(id="|href="#|url\(#)(\w+)', lambda at: f"{at[1]}{name}{ids.setdefault(at[2], len(ids))}", text)
        return re.sub(r"#0f0f\d\d", lambda color: f"var(--{_VARIABLES.get(color[0], 'ink')})", text)

    svg = re.sub(r"<[^>]*>", tag, svg)  # not the text between them
    svg = re.sub(r"\s*\n\s*", "\n", svg).strip()
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
