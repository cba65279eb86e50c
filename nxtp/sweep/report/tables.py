"""Rows, one per run and one per published value; their means; the Markdown table."""

from __future__ import annotations

import csv
import io
import math
import statistics
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nxtp.sweep.report.records import Record, is_finite, settings
from nxtp.sweep.report.spec import RESERVED, Published, Spec

Row = dict[str, str]  # as in results.csv; "" is blank
RUN = ("wall_time_s", "samples_seen")
HEAD, TAIL = RESERVED[:3], RESERVED[3:]
REFERENCES = ("label prior", "chance")
ORDER = ("laptop", "full", *REFERENCES, "paper")
OTHERS = 0.1  # cores that other work may use beside a time


@dataclass
class Value:
    """Mean, sample standard deviation (None of one run) and number of runs."""

    mean: float
    spread: float | None
    n: int

    def __str__(self) -> str:
        """
        >>> str(Value(0.7312, 0.0121, 3)), str(Value(9600, None, 1))
        ('0.731 ± 0.012 (3)', '9,600')
        """
        form = ",.0f" if abs(self.mean) >= 100 else ".3f" if abs(self.mean) < 10 else ".1f"
        spread = "" if self.spread is None else f" ± {self.spread:{form}} ({self.n})"
        return f"{self.mean:{form}}{spread}"


@dataclass
class Line:
    """Runs that differ only in what is averaged over: ``size``, ``columns`` title → text, metric → value."""

    size: str
    columns: dict[str, str]
    values: dict[str, Value]

    def fits(self, paper: Published) -> bool:
        """Whether a published value belongs to this line; to a full one, unless its ``where`` has another size."""
        known = self.columns | {"size": self.size}
        wanted = {name: text(value) for name, value in ({"size": "full"} | paper.where).items()}
        return all(equal(value, known[name]) for name, value in wanted.items())


def size(record: Record) -> str:
    return "laptop" if "laptop" in str(record.get("sweep") or "").split("/") else "full"


def is_time(metric: str) -> bool:
    return metric == "run.wall_time_s" or metric.endswith("_per_s")


def measured(record: Record) -> dict[str, float]:
    parts = {f"run.parameters.{k}": v for k, v in (record.get("parameters") or {}).items()}
    values = record["metrics"] | {f"run.{k}": record.get(k) for k in RUN} | parts
    return {k: v for k, v in values.items() if is_finite(v)}


def beside_others(records: list[Record]) -> list[bool]:
    """Whether other work ran beside each run: by its record, or, if an older record has no measurement, because another
    run on such a device overlaps with it."""
    spans = []
    for record in records:
        begin = datetime.fromisoformat(record["started"]).timestamp() if record.get("started") else math.nan
        spans.append((record.get("device"), begin, begin + (record.get("wall_time_s") or 0)))
    return [
        record["other_cores"] > OTHERS
        if record.get("other_cores") is not None
        else any(i != j and device == d and begin < e and b < end for j, (d, b, e) in enumerate(spans))
        for i, (record, (device, begin, end)) in enumerate(zip(records, spans, strict=True))
    ]


def text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(text, value))
    return "" if value is None else str(value)


def columns(record: Record, spec: Spec) -> dict[str, str]:
    """Column → its value, as report.yaml names it."""
    known = settings(record)
    found = {title: text(known.get(key)) for title, key in spec.columns.items()}
    names = {title: {text(value): name for value, name in each.items()} for title, each in spec.names.items()}
    return {title: names.get(title, {}).get(value, value) for title, value in found.items()}


def rows(records: list[Record], spec: Spec) -> list[Row]:
    """All of results.csv. A time that was measured beside other work is blank."""
    table = []
    for record, beside in zip(records, beside_others(records), strict=True):
        known = settings(record)
        values = {k: v for k, v in measured(record).items() if not (beside and is_time(k))}
        row = {"size": size(record), "sweep": text(record.get("sweep")), "run": record["name"]}
        row |= columns(record, spec) | {k: text(known.get(k)) for k in spec.over}
        table.append(row | {k: text(v) for k, v in values.items()})
    for name in REFERENCES:
        table += [{"size": name} | row for row in _references(records, spec, name)]
    for paper in spec.paper:
        row = {"size": "paper", paper.metric: text(paper.value), "source": paper.source}
        table.append(row | {title: text(paper.where.get(title)) for title in spec.columns})
    return table


def _references(records: list[Record], spec: Spec, name: str) -> list[Row]:
    """Rows of the reference ``name``: one for all records whose values agree within 5 %, with the columns shared."""
    found: list[tuple[dict[str, float], list[Row]]] = []
    for record in records:
        hits = record.get("hits", {}).items()
        values = {f"{where}/{metric}": v for where, kept in hits for metric, v in kept.get(name, {}).items()}
        if not values:
            continue
        shown = columns(record, spec)
        for known, of in found:
            if all(math.isclose(known.get(metric, v), v, rel_tol=0.05) for metric, v in values.items()):
                known.update(values | known)
                of.append(shown)
                break
        else:
            found.append((values, [shown]))
    rows = []
    for values, of in found:
        texts = {title: {shown[title] for shown in of} for title in spec.columns if len(found) > 1}
        where = {title: next(iter(each)) for title, each in texts.items() if len(each) == 1}
        rows.append(where | {metric: text(v) for metric, v in values.items()})
    return rows


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


def equal(one: str, other: str) -> bool:
    """As words, or as numbers: 1 and 1.0."""
    return one == other or (number(one) is not None and number(one) == number(other))


def order(content: str) -> tuple[int, float, str]:
    """Numbers by value, then words; blank last."""
    value = number(content)
    return (2, 0.0, "") if content == "" else (1, 0.0, content) if value is None else (0, value, "")


def place(content: str, column: str, spec: Spec) -> tuple[int, tuple[int, float, str]]:
    """Where a value stands among those of its column: in the order of ``names``, before others."""
    named = list(spec.names.get(column, {}).values())
    return (named.index(content) if content in named else len(named), order(content))


def lines(table: list[Row], spec: Spec) -> list[Line]:
    """Means over runs of one size that agree in all columns; published values likewise."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in table:
        groups.setdefault((row["size"], *(row.get(c) or "" for c in spec.columns)), []).append(row)
    found = []
    for (group_size, *texts), members in groups.items():
        values = {}
        for metric in spec.metrics:
            known = [v for row in members if (v := number(row.get(metric))) is not None]
            if known:
                spread = statistics.stdev(known) if len(known) > 1 else None
                values[metric] = Value(statistics.fmean(known), spread, len(known))
        found.append(Line(group_size, dict(zip(spec.columns, texts, strict=True)), values))
    return sorted(
        found, key=lambda line: (ORDER.index(line.size), [place(v, c, spec) for c, v in line.columns.items()])
    )


def cells(table: list[Row], spec: Spec) -> tuple[list[str], list[list[str]], int]:
    """Header, body and the index of the first metric.

    Columns that are blank throughout are dropped; "full" is said where laptop rows stand beside. A published value
    is in the rows that it fits; others have rows of size paper.
    """
    measured_lines = [line for line in lines(table, spec) if line.size != "paper"]
    rest: dict[tuple[str, ...], list[Published]] = {}
    for paper in spec.paper:
        if not any(line.fits(paper) for line in measured_lines):
            rest.setdefault(tuple(text(paper.where.get(c)) for c in spec.columns), []).append(paper)
    shown = [
        ((line.size, *line.columns.values()), line.values, [p for p in spec.paper if line.fits(p)])
        for line in measured_lines
    ]
    shown += [(("paper", *w), {}, rest[w]) for w in sorted(rest, key=lambda where: [order(c) for c in where])]
    header, body = ["size", *spec.columns], [list(texts) for texts, *_ in shown]
    if not any(line.size == "laptop" for line in measured_lines):
        header[0] = ""
        body = [[row[0].removeprefix("full"), *row[1:]] for row in body]
    for metric, title in spec.metrics.items():
        header.append(title)
        for row, (_, values, _) in zip(body, shown, strict=True):
            row.append(str(values.get(metric, "")))
        if any(paper.metric == metric for paper in spec.paper):
            header.append(f"{title}, published")
            for row, (*_, published) in zip(body, shown, strict=True):
                row.append("; ".join(_cited(paper) for paper in published if paper.metric == metric))
    filled = [i for i in range(len(header)) if any(row[i] for row in body)]
    start = sum(i <= len(spec.columns) for i in filled)
    return [header[i] for i in filled], [[row[i] for i in filled] for row in body], start


def _cited(paper: Published) -> str:
    return f"{text(paper.value)} ({paper.source})" if paper.source else text(paper.value)


def markdown(table: list[Row], spec: Spec) -> str:
    return as_markdown(*cells(table, spec))


def as_markdown(header: list[str], body: list[list[str]], start: int) -> str:
    """A table whose columns from ``start`` on are numbers."""
    rule = ["---" if i < start else "---:" for i in range(len(header))]
    escaped = [[c.replace("|", "\\|") for c in row] for row in (header, rule, *body)]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)
