"""Pictures as inline SVG. Colours are the page's own, so that light and dark are one picture."""

import io
import re
from collections.abc import Sequence
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

from .content import Curves, Histogram, Lines, Picture, number, percent

MISSING = "There are no pictures: matplotlib is not installed; pip install 'rewire[plot]'"
INK, GRID = "#000001", "#000002"  # stand-ins, exchanged for the page's colours
COLORS = {INK: "var(--quiet)", GRID: "var(--line)"} | {f"#00001{i}": f"var(--c{i})" for i in range(4)}
SERIES = [name for name in COLORS if name.startswith("#00001")]
STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))  # told apart without colours, too


def available() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def draw(picture: Picture, name: str) -> str:
    """An `<svg>` element; the same picture gives the same text. name: unique on the page, ids begin with it."""
    import matplotlib
    from matplotlib.figure import Figure

    # text stays text: smaller, and in the page's own type
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        _look(figure, axes, picture.x_label)
        if isinstance(picture, Lines):
            _lines(axes, picture)
        elif isinstance(picture, Curves):
            _curves(axes, picture)
        else:
            _histogram(axes, picture)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(file.getvalue(), name)


def alternative(picture: Picture) -> str:
    """The picture in words."""
    if isinstance(picture, Lines):
        show = percent if picture.rate else number
        ends = []
        for name, values in picture.series.items():
            known = [value for value in values if value is not None]
            ends.append(f"{name} from {show(known[0])} to {show(known[-1])}" if known else f"{name} unknown")
        return f"Line plot over {picture.x_label}: {'; '.join(ends)}."
    if isinstance(picture, Curves):
        first, last = median(curve[0] for curve in picture.curves), median(curve[-1] for curve in picture.curves)
        return f"Curves of {len(picture.curves)} facts: at first {number(first)}, at last {number(last)} (medians)."
    low, high = min(picture.values), max(picture.values)
    middle = median(picture.values)
    return (
        f"Histogram of {len(picture.values)} facts: {picture.x_label} from {number(low)} to {number(high)}, "
        f"median {number(middle)}."
    )


def _look(figure: Any, axes: Any, x_label: str) -> None:
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_color(GRID)
        spine.set_visible(side in ("left", "bottom"))
    axes.tick_params(which="both", color=GRID, labelcolor=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, color=INK)


def _lines(axes: Any, picture: Lines) -> None:
    known = [value for values in picture.series.values() for value in values if value is not None]
    for place, (name, values) in enumerate(picture.series.items()):
        shown = [float("nan") if value is None else value for value in values]
        line, mark = STYLES[place % len(STYLES)]
        color = SERIES[place % len(SERIES)]
        width = max(1.4, 3.2 - 0.7 * place)  # one that lies under another shows at its sides
        axes.plot(picture.x, shown, line, color=color, marker=mark, markersize=2 + width, linewidth=width, label=name)
    if picture.rate:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    elif min(known) > 0 and max(known) > 10 * min(known):
        axes.set_yscale("log")
    if len(picture.x) <= 12 and all(b - a == 1 for a, b in pairwise(picture.x)):
        axes.set_xticks(picture.x)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="best")


def _curves(axes: Any, picture: Curves) -> None:
    from matplotlib.ticker import MaxNLocator

    longest = max(map(len, picture.curves))
    there = [[curve[step] for curve in picture.curves if len(curve) > step] for step in range(longest)]
    x = list(range(longest))
    ends = [_deciles(values) for values in there]
    axes.fill_between(x, [low for low, _ in ends], [high for _, high in ends], color=SERIES[0], alpha=0.2, linewidth=0)
    axes.plot(x, list(map(median, there)), color=SERIES[0], linewidth=1.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if min(min(values) for values in there) > 0:
        axes.set_yscale("log")


def _histogram(axes: Any, picture: Histogram) -> None:
    from matplotlib.ticker import MaxNLocator

    bins: Any = min(30, max(8, int(len(picture.values) ** 0.5) * 2))
    low, high = min(picture.values), max(picture.values)
    if low > 0 and high > 100 * low:
        bins = [low * (high / low) ** (place / bins) for place in range(bins + 1)]
        axes.set_xscale("log")
    elif high - low < 40 and all(value == int(value) for value in picture.values):  # steps: a bar each
        bins = [low - 0.5 + place for place in range(int(high - low) + 2)]
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.hist(picture.values, bins=bins, color=SERIES[0], alpha=0.85)
    axes.set_ylabel("facts", color=INK)
    if picture.mark is not None:
        at, what = picture.mark
        axes.axvline(at, color=SERIES[1], linestyle="--", linewidth=1.4, label=what)
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)


def _deciles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    cuts = quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def _inline(svg: str, name: str) -> str:
    """For use inside HTML: no prologue, no metadata, no namespaces, ids that are the page's only ones."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg, count=0)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"\sheight="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(
        r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true" focusable="false">', svg, count=1
    )
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    svg = re.sub(r"font: (?:[\w.]+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for stand_in, color in COLORS.items():
        svg = svg.replace(stand_in, color)
    return svg.strip()
