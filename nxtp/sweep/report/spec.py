"""report.yaml: what the table and the plot of a study show (docs/studies.md)."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nxtp.config import to_dataclass
from nxtp.errors import UserError, nearest, one_line

RESERVED = ("size", "sweep", "run", "source")  # columns of results.csv


@dataclass
class Plot:
    """``x`` a column or a metric, ``y`` metrics (a panel each), ``lines`` a column; ``where`` column → value of the
    arms that are drawn."""

    x: str
    y: list[str]
    kind: str = "line"
    lines: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    log_x: bool = False


@dataclass
class Published:
    """A published value, for the rows that ``where`` describes: column → value."""

    where: dict[str, Any]
    metric: str
    value: float
    source: str = ""


@dataclass
class Spec:
    """``columns`` title → configuration key; ``over`` keys averaged over; ``metrics`` metric → title; ``baseline``
    column → value of the arms that others are compared with; ``names`` column → value → what is shown for it."""

    columns: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    over: list[str] = field(default_factory=lambda: ["seed"])
    baseline: dict[str, Any] = field(default_factory=dict)
    names: dict[str, dict[Any, str]] = field(default_factory=dict)
    paper: list[Published] = field(default_factory=list)
    plot: Plot | None = None

    @classmethod
    def read(cls, path: Path) -> Spec:
        """
        Raises:
            UserError: no such file, no YAML, a key that is unknown or missing, a name that is no column or metric.
        """
        try:
            loaded = OmegaConf.load(path)  # 3e-4 is a number, as in the configuration
            content: Any = OmegaConf.to_container(loaded, resolve=True)
        except FileNotFoundError:
            raise UserError(f"'{path}' is missing: it specifies what the report shows (docs/studies.md).") from None
        except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
            raise UserError(f"'{path}' cannot be read as YAML: {one_line(error)}") from error
        if not isinstance(content, dict) or not content:
            raise UserError(f"'{path}' must be a mapping, got '{content}'.")
        spec = to_dataclass(cls, content, f"{path}: ")
        titles = [*spec.columns, *spec.metrics.values()]
        for title in titles:
            if titles.count(title) > 1 or title in (*spec.over, *RESERVED):
                raise UserError(f"{path}: '{title}' is a column of the table already; give it another title.")
        for shown in [*titles, *(name for each in spec.names.values() for name in each.values())]:
            if not shown.isprintable() or "<!--" in shown:
                raise UserError(f"{path}: {shown!r} cannot be in a table; give it another name.")
        if not spec.over or not spec.metrics:
            raise UserError(f"{path}: over and metrics need an entry each.")
        _require(spec.baseline, spec.columns, f"{path}, baseline")
        _require(spec.names, spec.columns, f"{path}, names")
        for paper in spec.paper:
            _require([paper.metric], spec.metrics, f"{path}, paper")
            _require(paper.where, [*spec.columns, "size"], f"{path}, paper, where")
            if not math.isfinite(paper.value):
                raise UserError(f"{path}, paper: the value of {paper.metric} is {paper.value}, no finite number.")
        if plot := spec.plot:
            _require([plot.kind], ("line", "bar"), f"{path}, plot, kind")
            _require([plot.x], [*spec.columns, *spec.metrics], f"{path}, plot, x")
            _require(plot.y, spec.metrics, f"{path}, plot, y")
            _require([plot.lines] if plot.lines else [], spec.columns, f"{path}, plot, lines")
            _require(plot.where, spec.columns, f"{path}, plot, where")
        return spec


def _require(names: Collection[str], known: Collection[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{where}: unknown '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")
