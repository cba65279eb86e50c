"""plot.svg, drawn from the rows of results.csv alone; the same rows give the same bytes."""

from __future__ import annotations

import io
import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nxtp.sweep.report.spec import Plot, Spec
from nxtp.sweep.report.tables import REFERENCES, Line, Row, lines, number, order, place, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito: colour-blind-safe
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
STYLE = {"svg.hashsalt": "nxtp", "svg.fonttype": "none", "font.size": 11}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
Point = tuple[str, float, float]  # x, mean, spread (NaN of one run: no bar)
Group = tuple[str, ...]  # values of the columns that distinguish lines


def svg(table: list[Row], spec: Spec) -> str | None:
    """None where there is nothing to draw."""
    plot = spec.plot
    if plot is None or not plot.y:
        return None
    every = [line for line in lines(table, spec) if any(y in line.values for y in plot.y)]
    where = {column: text(value) for column, value in plot.where.items()}
    references = [line for line in every if line.size in REFERENCES]
    drawn = [line for line in every if line.size not in REFERENCES and where.items() <= line.columns.items()]
    if not drawn:
        return None
    import matplotlib  # takes seconds
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 4.6 * len(plot.y)), 4), layout="constrained")
        panels = figure.subplots(1, len(plot.y), squeeze=False)[0]
        for axes, metric in zip(panels, plot.y, strict=True):
            _panel(axes, drawn, metric, spec, plot)
            low, high = axes.get_ylim()
            for line, style in zip(references, (":", "--", "-."), strict=False):
                # Far below, it would flatten the lines; the table has it.
                if metric in line.values and (plot.kind == "bar" or line.values[metric].mean > 2 * low - high):
                    of = (value for column, value in line.columns.items() if column not in where)
                    label = ", ".join(filter(None, (line.size, *of)))
                    axes.axhline(line.values[metric].mean, color="#555555", ls=style, lw=1.2, label=label)
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
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    apart = _apart(drawn, plot)
    series = _series(drawn, metric, plot, apart)
    xs = sorted({x for points in series.values() for x, *_ in points}, key=lambda x: place(x, plot.x, spec))
    values = [value for x in xs if (value := number(x)) is not None]
    numeric = plot.kind == "line" and len(values) == len(xs)
    position = dict(zip(xs, values if numeric else map(float, range(len(xs))), strict=True))
    groups = sorted({tuple(line.columns[c] for c in apart) for line in drawn}, key=_order)  # as in the other panels
    bars = [bar for bar in series if bar[1] != "paper"]
    several = len({size for _, size in bars}) > 1
    at_x = {x: [bar for bar in series if any(point[0] == x for point in series[bar])] for x in xs}
    barred = {(x, bar[0]) for x in xs for bar in at_x[x] if bar[1] != "paper"}
    # A published value is in the middle of its group's bars, or has a place of its own.
    beside = {x: [bar for bar in at_x[x] if bar[1] != "paper" or (x, bar[0]) not in barred] for x in xs}
    width = 0.8 / max([1, *map(len, beside.values())])

    def offset(x: str, group: Group, size: str) -> float:
        """Of a bar or a published value from its x."""
        places = [i for i, bar in enumerate(beside[x]) if bar[0] == group and size in ("paper", bar[1])]
        return (fmean(places) - (len(beside[x]) - 1) / 2) * width if places and plot.kind == "bar" else 0.0

    for (group, size), points in series.items():
        cycle, index = divmod(groups.index(group), len(PALETTE))
        colour, marker = PALETTE[index], MARKERS[(cycle + index) % len(MARKERS)]
        of = ", ".join(f"{c}: {v}" for c, v in zip(apart, group, strict=True) if v)
        label = ", ".join(filter(None, (of, size if several or size == "paper" or not of else "")))
        weak = several and size == "laptop"
        at = [position[x] + offset(x, group, size) for x, *_ in points]
        means, spreads = [p[1] for p in points], [p[2] for p in points]
        if size == "paper":
            axes.plot(at, means, marker, ms=9, mfc="none", mec=colour, mew=1.6, label=label, zorder=3)
        elif plot.kind == "bar":
            alpha = 0.6 if weak else 1.0
            axes.bar(at, means, width, yerr=spreads, capsize=3, color=colour, alpha=alpha, label=label)
        else:
            form = marker + ("--" if weak else "-")
            axes.errorbar(at, means, yerr=spreads, fmt=form, ms=6, capsize=3, color=colour, label=label)
    if not numeric:
        long = sum(map(len, xs)) > 45  # characters of a panel's width: they would lie on one another
        slanted: Any = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
        axes.set_xticks(range(len(xs)), xs, **slanted)
    elif plot.log_x and all(value > 0 for value in values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if numeric and plot.x in spec.columns and len(xs) <= 8:
        axes.set_xticks(values, xs)
        axes.set_xticks([], minor=True)
    axes.set_xlabel(spec.metrics.get(plot.x, plot.x))
    only_laptop = {size for _, size in series} == {"laptop"}
    axes.set_ylabel(spec.metrics[metric] + (" (laptop size)" if only_laptop else ""))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _apart(drawn: list[Line], plot: Plot) -> list[str]:
    """Columns that distinguish lines: ``lines``; where x is a column also others that vary, else points hide others."""
    first = [plot.lines] if plot.lines else []
    ours = [line for line in drawn if line.size != "paper"]
    if not ours or plot.x not in ours[0].columns:
        return first
    others = [c for c in ours[0].columns if c not in (plot.x, plot.lines)]
    return first + [c for c in others if len({line.columns[c] for line in ours}) > 1]


def _order(group: Group) -> list[tuple[int, float, str]]:
    return [order(c) for c in group]


def _series(drawn: list[Line], metric: str, plot: Plot, apart: list[str]) -> dict[tuple[Group, str], list[Point]]:
    """(group, size) → points in order of x. A line without x or y has none."""
    series: dict[tuple[Group, str], list[Point]] = {}
    for line in drawn:
        value = line.values.get(metric)
        x = line.columns.get(plot.x, "")
        if plot.x in line.values:
            x = str(line.values[plot.x].mean)
        if value is not None and x != "":
            point = (x, value.mean, math.nan if value.spread is None else value.spread)
            series.setdefault((tuple(line.columns[c] for c in apart), line.size), []).append(point)
    in_order = sorted(series.items(), key=lambda item: (_order(item[0][0]), item[0][1]))
    return {key: sorted(points, key=lambda point: order(point[0])) for key, points in in_order}
