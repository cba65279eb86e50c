"""What a search chooses from: Hydra's ranges (choice, range, interval, tag log) as distributions of Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Transformer
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from nxtp.errors import UserError
from nxtp.sweep.sweep import parse

DIGITS = 6  # of a number between two others: what is run, and what its directory is called


@dataclass(frozen=True)
class Axis:
    """``key`` as on the command line; ``given``, its range as it was written; choices are texts of Hydra's grammar."""

    key: str
    given: str
    distribution: BaseDistribution

    def override(self, value: Any) -> str:
        """
        >>> Axis("optim.lr", "interval(0,1)", FloatDistribution(0, 1)).override(0.12345678)
        'optim.lr=0.123457'
        """
        return f"{self.key}={f'{value:.{DIGITS}g}' if isinstance(value, float) else value}"

    @property
    def tries(self) -> list[str]:
        """Overrides that show whether the axis is right: of all choices, of both ends."""
        d = self.distribution
        values = d.choices if isinstance(d, CategoricalDistribution) else (d.low, d.high)
        return [self.override(value) for value in values]


def split(overrides: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """(axes, overrides of other keys).

    Raises:
        UserError: an override that Hydra cannot read, an axis that holds nothing or cannot be searched, no axis.
    """
    try:
        parsed = parse(overrides)
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from error
    axes = {o.get_key_element(): _axis(o) for o in parsed if o.is_sweep_override()}
    if not axes:
        raise UserError("Nothing to search: no range, as in 'optim.lr=tag(log,interval(1e-5,1e-2))'.")
    for key in axes:
        if key == "name" or key.startswith(("hydra.", "hydra/")):
            raise UserError(f"{key}: a search has one; its runs are named by what differs.")
    searched = {o.key_or_group for o in parsed if o.is_sweep_override()}
    return list(axes.values()), [o.input_line for o in parsed if o.key_or_group not in searched]


def _axis(override: Override) -> Axis:
    key, given, sweep = override.get_key_element(), override.get_value_string(), override.value()
    unknown = set(getattr(sweep, "tags", ())) - {"log"}
    if unknown:
        raise UserError(f"{key}={given}: unknown tag '{min(unknown)}'. A search knows log.")
    log = "log" in getattr(sweep, "tags", ())
    try:
        if isinstance(sweep, RangeSweep):
            return Axis(key, given, _range(sweep, log))
        if isinstance(sweep, IntervalSweep):
            kind = IntDistribution if isinstance(sweep.start, int) and isinstance(sweep.end, int) else FloatDistribution
            return Axis(key, given, kind(sweep.start, sweep.end, log=log))
        if isinstance(sweep, ChoiceSweep):
            if log:
                raise ValueError("log is of an interval or a range, not of a choice")
            return Axis(key, given, CategoricalDistribution(list(dict.fromkeys(map(Transformer.str, sweep.list)))))
        raise ValueError("name the choices, as in choice(a,b)")
    except ValueError as error:
        raise UserError(f"{key}={given}: {str(error).rstrip('.')}.") from error


def _range(sweep: RangeSweep, log: bool) -> BaseDistribution:
    """As Hydra counts it: without its end."""
    if not sweep.step:
        raise ValueError("its step is 0")
    values = sorted(sweep.range())
    if not values:
        raise ValueError("holds nothing: it ends before its second number")
    if all(isinstance(value, int) for value in values):
        return IntDistribution(values[0], values[-1], log=log, step=abs(sweep.step))
    return FloatDistribution(values[0], values[-1], log=log, step=abs(sweep.step))
