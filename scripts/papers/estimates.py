"""Means, differences and ratios over seeds, with their intervals."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as t_distribution

from intervals import CONFIDENCE, percentile_interval


@dataclass(frozen=True)
class Estimate:
    """A mean, or a ratio of means, over seeds.

    Attributes:
        value: None where a seed diverged.
        low: lower end of the 95 % interval; None with fewer than two seeds, which say nothing of their spread.
        high: upper end.
        std: sample standard deviation; None for ratios and with fewer than two seeds.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    std: float | None = None

    def interval(self, digits: int, scale: float = 1.0) -> str | None:
        """ "[low, high]"."""
        if self.low is None or self.high is None:
            return None
        return f"[{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"

    def shown(self, digits: int, scale: float = 1.0) -> str | None:
        """The value, and its interval if there is one."""
        if self.value is None:
            return None
        return f"{scale * self.value:.{digits}f} {self.interval(digits, scale) or '(one seed)'}"


def mean(values: Iterable[float | None]) -> Estimate:
    """Mean and t interval over seeds."""
    known = list(values)
    if not known or any(value is None or not math.isfinite(value) for value in known):
        return Estimate(None)
    numbers = [float(value) for value in known if value is not None]
    value = statistics.fmean(numbers)
    if len(numbers) < 2:
        return Estimate(value)
    std = statistics.stdev(numbers)
    half = float(t_distribution.ppf(0.5 + CONFIDENCE / 2, len(numbers) - 1)) * std / math.sqrt(len(numbers))
    return Estimate(value, value - half, value + half, std)


def difference(of: Mapping[str, float | None], baseline: Mapping[str, float | None]) -> Estimate:
    """Mean of the difference between two methods, over the seeds that both have."""
    pairs = [(of[seed], baseline[seed]) for seed in of if seed in baseline]
    return mean([None if a is None or b is None else a - b for a, b in pairs])


def ratio(of: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean over mean, with a percentile bootstrap over the seeds of both; None where the baseline is 0."""
    if not of or not baseline or not statistics.fmean(baseline):
        return Estimate(None)
    value = statistics.fmean(of) / statistics.fmean(baseline)
    if min(len(of), len(baseline)) < 2:
        return Estimate(value)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = percentile_interval(
            (np.asarray(of, float), np.asarray(baseline, float)), lambda a, b, axis: a.mean(axis) / b.mean(axis)
        )
    return Estimate(value, low, high)
