"""plot.svg, drawn from the rows of results.csv alone; the same rows give the same bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from nxtp.sweep.report.spec import Plot, Spec
from nxtp.sweep.report.tables import Line, Row, lines, number, order

# Okabe & Ito: colour-blind-safe
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
STYLE = {"svg.hashsalt": "nxtp", "svg.fonttype": "none", "font.size": 11}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
Point = tuple[str | float, float, float]  # x, mean, spread (NaN of one run: no bar)
Group = tuple[str, ...]  # values of the columns that tell lines apart


def svg(table: list[Row], spec: Spec) -> str | None:
    """None where there is nothing to draw."""
    plot = spec.plot
    if plot is None or not plot.y:
        return None
    drawn = [line for line in lines(table, spec) if any(y in line.values for y in plot.y)]
    if not drawn:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 4.6 * len(plot.y)), 4), layout="constrained")
        panels = figure.subplots(1, len(plot.y), squeeze=False)[0]
        for axes, metric in zip(panels, plot.y, strict=True):
            _panel(axes, drawn, metric, spec, plot)
        handles = {label: h for a in panels for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
        if len(handles) > 1 or any("paper" in label for label in handles):
            widest = 0.7 + 0.085 * max(map(len, handles))  # inches, about
            columns = max(1, min(3, int(figure.get_figwidth() / widest)))
            figure.set_figheight(3.6 + 0.25 * math.ceil(len(handles) / columns))
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _panel(axes: Axes, drawn: list[Line], metric: str, spec: Spec, plot: Plot) -> None:
    apart = _apart(drawn, plot)
    known = list(_series(drawn, metric, plot, apart))
    xs = sorted({str(x) for *_, points in known for x, *_ in points}, key=order)
    numeric = plot.kind == "line" and all(number(x) is not None for x in xs)
    groups = sorted({group for group, *_ in known}, key=_order)
    wide = [(g, s) for g, s, _ in known if s != "paper"]
    width = 0.8 / max(1, len(wide))

    def offset(bar: tuple[Group, str]) -> float:
        return (wide.index(bar) - (len(wide) - 1) / 2) * width

    several = len({s for _, s, _ in known if s != "paper"}) > 1
    for group, size, points in known:
        colour = PALETTE[groups.index(group) % len(PALETTE)]
        turn, place = divmod(groups.index(group), len(PALETTE))
        marker = MARKERS[(turn + place) % len(MARKERS)]
        of = ", ".join(f"{c}: {v}" for c, v in zip(apart, group, strict=True) if v)
        label = ", ".join(filter(None, (of, size if several or size == "paper" or not of else "")))
        at = [number(str(x)) if numeric else float(xs.index(str(x))) for x, *_ in points]
        means, spreads = [p[1] for p in points], [p[2] for p in points]
        if size == "paper":
            bars = [offset(w) for w in wide if w[0] == group] if plot.kind == "bar" else []
            at = [a + (sum(bars) / len(bars) if bars else 0.0) for a in at]
            axes.plot(at, means, marker, ms=9, mfc="none", mec=colour, mew=1.6, label=label, zorder=3)
        elif plot.kind == "bar":
            alpha = 0.6 if several and size == "laptop" else 1.0
            at = [a + offset((group, size)) for a in at]
            axes.bar(at, means, width, yerr=spreads, capsize=3, color=colour, alpha=alpha, label=label)
        else:
            dashes = "--" if several and size == "laptop" else "-"
            axes.errorbar(at, means, yerr=spreads, fmt=marker + dashes, ms=6, capsize=3, color=colour, label=label)
    if not numeric:
        axes.set_xticks(range(len(xs)), xs)
    elif plot.log_x and all(number(x) > 0 for x in xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if numeric and plot.x in spec.columns and len(xs) <= 8:
        axes.set_xticks([number(x) for x in xs], xs)
        axes.set_xticks([], minor=True)
    axes.set_xlabel(spec.metrics.get(plot.x, plot.x))
    only_laptop = {s for _, s, _ in known} == {"laptop"}
    axes.set_ylabel(spec.metrics[metric] + (" (laptop size)" if only_laptop else ""))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _apart(drawn: list[Line], plot: Plot) -> list[str]:
    """Columns that tell lines apart: ``lines``, and others that vary while x is a column, lest points hide others."""
    first = [plot.lines] if plot.lines else []
    ours = [line for line in drawn if line.size != "paper"]
    if not ours or plot.x not in ours[0].columns:
        return first
    others = [c for c in ours[0].columns if c not in (plot.x, plot.lines)]
    return first + [c for c in others if len({line.columns[c] for line in ours}) > 1]


def _order(group: Group) -> list[tuple[int, float, str]]:
    return [order(c) for c in group]


def _series(drawn: list[Line], metric: str, plot: Plot, apart: list[str]) -> Iterator[tuple[Group, str, list[Point]]]:
    """Line's group, size, and its points in order of x. What lacks x or y is not drawn."""
    series: dict[tuple[Group, str], list[Point]] = {}
    for line in drawn:
        value = line.values.get(metric)
        x: str | float = line.columns.get(plot.x, "")
        if plot.x not in line.columns:
            x = line.values[plot.x].mean if plot.x in line.values else ""
        if value is None or x == "":
            continue
        group = tuple(line.columns[c] for c in apart)
        spread = math.nan if value.spread is None else value.spread
        series.setdefault((group, line.size), []).append((x, value.mean, spread))
    for (group, size), points in sorted(series.items(), key=lambda item: (_order(item[0][0]), item[0][1])):
        yield group, size, sorted(points, key=lambda point: order(str(point[0])))
