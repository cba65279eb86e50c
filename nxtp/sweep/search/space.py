"""The ranges of a search: Hydra's sweep syntax (choice, range, interval, tag log) as Optuna's distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Transformer
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from nxtp.errors import UserError
from nxtp.sweep.sweep import parse

DIGITS = 6  # significant digits of a float: in the override and in the directory's name


@dataclass(frozen=True)
class Axis:
    """A key that is searched. ``text`` is its range as the user wrote it; choices are strings in Hydra's syntax."""

    key: str
    text: str
    distribution: BaseDistribution

    def override(self, value: Any) -> str:
        """
        >>> Axis("optim.lr", "interval(0,1)", FloatDistribution(0, 1)).override(0.12345678)
        'optim.lr=0.123457'
        """
        return f"{self.key}={f'{value:.{DIGITS}g}' if isinstance(value, float) else value}"

    @property
    def extremes(self) -> list[str]:
        """Overrides that show whether the axis is valid: all choices, or both ends."""
        d = self.distribution
        values = d.choices if isinstance(d, CategoricalDistribution) else (d.low, d.high)
        return [self.override(value) for value in values]


def split(params: Mapping[str, Any], overrides: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """The axes, and the overrides of other keys.

    Args:
        params: key → range of the configuration, ``hydra.sweeper.params``. All of them are axes.
        overrides: those of the command line. They replace ``params`` of the same key.

    Raises:
        UserError: a range is empty or cannot be searched, or there is no range.
    """
    parsed = {o.get_key_element(): o for o in parse([*(f"{k}={v}" for k, v in params.items()), *overrides])}
    if not any(o.is_sweep_override() for o in parsed.values()):
        raise UserError("Nothing to search: no range, as in 'optim.lr=tag(log,interval(1e-5,1e-2))'.")
    searched = {key: o for key, o in parsed.items() if key in params or o.is_sweep_override()}
    return [_axis(o) for o in searched.values()], [
        str(o.input_line) for key, o in parsed.items() if key not in searched
    ]


def _axis(override: Override) -> Axis:
    key, text, sweep = override.get_key_element(), override.get_value_string(), override.value()
    tags: set[str] = getattr(sweep, "tags", set())
    try:
        if tags - {"log"}:
            raise ValueError(f"unknown tag '{min(tags - {'log'})}'; the only one is log")
        return Axis(key, text, _distribution(override, sweep, "log" in tags))
    except ValueError as error:
        raise UserError(f"{key}={text}: {str(error).rstrip('.')}.") from error


def _distribution(override: Override, sweep: Any, log: bool) -> BaseDistribution:
    if not override.is_sweep_override():
        return CategoricalDistribution([override.get_value_element_as_str()])
    if isinstance(sweep, RangeSweep):
        if not sweep.step:
            raise ValueError("its step is 0")
        values = sorted(sweep.range())  # without its end, as Hydra counts
        if not values:
            raise ValueError("the range is empty: it ends before its second number")
        kind = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
        return kind(values[0], values[-1], log=log, step=abs(sweep.step))
    if isinstance(sweep, IntervalSweep):
        kind = IntDistribution if isinstance(sweep.start, int) and isinstance(sweep.end, int) else FloatDistribution
        return kind(sweep.start, sweep.end, log=log)
    if not isinstance(sweep, ChoiceSweep):
        raise ValueError("name the choices, as in choice(a,b)")
    if log:
        raise ValueError("log is for an interval or a range, not for a choice")
    return CategoricalDistribution(list(dict.fromkeys(map(Transformer.str, sweep.list))))
