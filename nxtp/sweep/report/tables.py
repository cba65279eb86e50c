"""Rows, one a run and one a published value; their means; the Markdown table."""

from __future__ import annotations

import csv
import io
import math
import statistics
from dataclasses import dataclass
from typing import Any

from nxtp.sweep.report.records import Record, is_finite
from nxtp.sweep.report.spec import Spec

Row = dict[str, str]  # as in results.csv; "" is blank
RUN = ("wall_time_s", "samples_seen")
HEAD, TAIL = ("size", "sweep", "run"), ("source",)
ORDER = ("laptop", "full", "paper")


@dataclass
class Value:
    """Mean, sample standard deviation (None of one run) and number of runs."""

    mean: float
    spread: float | None
    n: int


@dataclass
class Line:
    """Runs that differ only in what is averaged over: ``size``, ``columns`` title → text, metric → value."""

    size: str
    columns: dict[str, str]
    values: dict[str, Value]


def size(record: Record) -> str:
    return "laptop" if str(record.get("sweep") or "").split("/")[-1] == "laptop" else "full"


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value; lists are values."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {k: v for name, c in config.items() for k, v in leaves(c, f"{prefix}.{name}" if prefix else name).items()}


def settings(record: Record) -> dict[str, Any]:
    return leaves(record["config"]) | {"seed": record["seed"]}


def measured(record: Record) -> dict[str, float]:
    parts = {f"run.parameters.{k}": v for k, v in (record.get("parameters") or {}).items()}
    values = record["metrics"] | {f"run.{k}": record.get(k) for k in RUN} | parts
    return {k: v for k, v in values.items() if is_finite(v)}


def text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(text, value))
    return "" if value is None else str(value)


def rows(records: list[Record], spec: Spec) -> list[Row]:
    """All of results.csv. Two columns of one title would hide each other: titles are keys of one mapping."""
    made = []
    for record in records:
        known, values = settings(record), measured(record)
        row = {"size": size(record), "sweep": text(record.get("sweep")), "run": record["name"]}
        row |= {title: text(known.get(k)) for title, k in spec.columns.items()}
        row |= {k: text(known.get(k)) for k in spec.over}
        made.append(row | {k: text(v) for k, v in values.items()})
    for paper in spec.paper:
        row = {"size": "paper", paper.metric: text(paper.value), "source": paper.source}
        made.append(row | {title: text(paper.where.get(title)) for title in spec.columns})
    return made


def as_csv(table: list[Row], spec: Spec) -> str:
    first = [*HEAD, *spec.columns, *spec.over]
    names = [*first, *sorted({k for row in table for k in row} - {*first, *TAIL}), *TAIL]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def read_csv(content: str) -> list[Row]:
    return list(csv.DictReader(io.StringIO(content)))


def number(content: str | None) -> float | None:
    try:
        value = float(content or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def order(content: str) -> tuple[int, float, str]:
    """Numbers by value, then words; blank last."""
    value = number(content)
    return (2, 0.0, "") if content == "" else (1, 0.0, content) if value is None else (0, value, "")


def lines(table: list[Row], spec: Spec) -> list[Line]:
    """Means over runs of one size that agree in all columns; published values likewise."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in table:
        groups.setdefault((row["size"], *(row.get(c) or "" for c in spec.columns)), []).append(row)
    made = []
    for (group_size, *cells), members in groups.items():
        values = {}
        for metric in spec.metrics:
            known = [v for row in members if (v := number(row.get(metric))) is not None]
            if known:
                spread = statistics.stdev(known) if len(known) > 1 else None
                values[metric] = Value(statistics.fmean(known), spread, len(known))
        made.append(Line(group_size, dict(zip(spec.columns, cells, strict=True)), values))
    return sorted(made, key=lambda line: (ORDER.index(line.size), [order(c) for c in line.columns.values()]))


def shown(value: Value | None) -> str:
    """
    >>> shown(Value(0.7312, 0.0121, 3)), shown(Value(9600, None, 1)), shown(None)
    ('0.731 ± 0.012 (3)', '9,600', '')
    """
    if value is None:
        return ""
    form = ",.0f" if abs(value.mean) >= 100 else ".3f" if abs(value.mean) < 10 else ".1f"
    spread = "" if value.spread is None else f" ± {value.spread:{form}} ({value.n})"
    return f"{value.mean:{form}}{spread}"


def cells(table: list[Row], spec: Spec) -> tuple[list[str], list[list[str]]]:
    """Header and body, without columns that are blank throughout, or sizes where all rows are full.

    A published value that fits a row stands there; others are rows of size paper.
    """
    published = [m for m in spec.metrics if any(p.metric == m for p in spec.paper)]
    header = ["size", *spec.columns]
    for metric, title in spec.metrics.items():
        header += [title] + ([f"{title}, published"] if metric in published else [])
    placed: set[int] = set()
    all_lines = [line for line in lines(table, spec) if line.size != "paper"]
    body = []
    for line in all_lines:
        row = [line.size, *line.columns.values()]
        for metric in spec.metrics:
            row.append(shown(line.values.get(metric)))
            if metric in published:
                fits = [i for i, p in enumerate(spec.paper) if p.metric == metric and _fits(p.where, line)]
                placed.update(fits)
                row.append("; ".join(_published(spec.paper[i]) for i in fits))
        body.append(row)
    rest: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for i, paper in enumerate(spec.paper):
        if i not in placed:
            where = tuple(text(paper.where.get(c)) for c in spec.columns)
            rest.setdefault(where, {}).setdefault(paper.metric, []).append(_published(paper))
    for where, values in sorted(rest.items(), key=lambda item: [order(c) for c in item[0]]):
        row = ["paper", *where]
        for metric in spec.metrics:
            row += [""] + (["; ".join(values.get(metric, []))] if metric in published else [])
        body.append(row)
    says_nothing = [{"", "full"}, *[{""}] * (len(header) - 1)]
    filled = [i for i, nothing in enumerate(says_nothing) if any(row[i] not in nothing for row in body)]
    return [header[i] for i in filled], [[row[i] for i in filled] for row in body]


def first_metric(header: list[str], spec: Spec) -> int:
    return sum(title in ("size", *spec.columns) for title in header)


def _fits(where: dict[str, Any], line: Line) -> bool:
    found = {"size": "full"} | where
    known = line.columns | {"size": line.size}
    return all(text(value) == known[name] or _equal(text(value), known[name]) for name, value in found.items())


def _equal(left: str, right: str) -> bool:
    return number(left) is not None and number(left) == number(right)


def _published(paper: Any) -> str:
    return f"{text(paper.value)} ({paper.source})" if paper.source else text(paper.value)


def markdown(table: list[Row], spec: Spec) -> str:
    header, body = cells(table, spec)
    start = first_metric(header, spec)
    rule = ["---" if i < start else "---:" for i in range(len(header))]
    made = [[c.replace("|", "\\|") for c in row] for row in (header, rule, *body)]
    return "".join(f"| {' | '.join(row)} |\n" for row in made)
