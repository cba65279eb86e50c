"""report.yaml: what the table and the plot of a study show (docs/studies.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nxtp.errors import UserError, nearest


@dataclass
class Plot:
    """``x`` a column or a metric, ``y`` metrics (a panel each), ``lines`` a column."""

    x: str
    y: list[str]
    kind: str = "line"
    lines: str | None = None
    log_x: bool = False


@dataclass
class Paper:
    where: dict[str, Any]
    metric: str
    value: float
    source: str = ""


@dataclass
class Spec:
    """``columns`` title → configuration key; ``over`` keys averaged over; ``metrics`` metric → title."""

    columns: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    over: list[str] = field(default_factory=lambda: ["seed"])
    paper: list[Paper] = field(default_factory=list)
    plot: Plot | None = None

    @classmethod
    def read(cls, path: Path) -> Spec:
        """
        Raises:
            UserError: no such file, no YAML, a key that is unknown or missing, a name that is no column or metric.
        """
        try:
            content = yaml.safe_load(path.read_text())
        except FileNotFoundError:
            raise UserError(f"'{path}' is missing: it says what the report shows (docs/studies.md).") from None
        except yaml.YAMLError as error:
            raise UserError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
        spec = _build(cls, content, str(path))
        _require(spec.columns, dict, f"{path}, columns")
        _require(spec.metrics, dict, f"{path}, metrics")
        _require(spec.over, list, f"{path}, over")
        _require(spec.paper, list, f"{path}, paper")
        spec.paper = [_build(Paper, p, f"{path}, paper") for p in spec.paper]
        for paper in spec.paper:
            _require(paper.where, dict, f"{path}, paper, where")
            _known(paper.metric, spec.metrics, f"{path}, paper")
            for name in paper.where:
                _known(name, [*spec.columns, "size"], f"{path}, paper, where")
            if isinstance(paper.value, bool) or not isinstance(paper.value, int | float):
                raise UserError(f"{path}, paper: value is '{paper.value}', not a number.")
        if spec.plot is not None:
            spec.plot = plot = _build(Plot, spec.plot, f"{path}, plot")
            _known(plot.kind, ("line", "bar"), f"{path}, plot, kind")
            _known(plot.x, [*spec.columns, *spec.metrics], f"{path}, plot, x")
            _require(plot.y, list, f"{path}, plot, y")
            for name in plot.y:
                _known(name, spec.metrics, f"{path}, plot, y")
            if plot.lines is not None:
                _known(plot.lines, spec.columns, f"{path}, plot, lines")
        return spec


def _build(cls: type, content: Any, where: str) -> Any:
    _require(content, dict, where)
    for name in content:
        _known(name, cls.__dataclass_fields__, where)
    try:
        return cls(**content)
    except TypeError as error:
        raise UserError(f"{where}: {str(error).removeprefix(f'{cls.__name__}.__init__() ')}.") from error


def _require(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, kind):
        raise UserError(f"{where}: should be a {'mapping' if kind is dict else 'list'}; it is '{value}'.")


def _known(name: Any, known: Any, where: str) -> None:
    if name not in known:
        raise UserError(f"{where}: unknown '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")
