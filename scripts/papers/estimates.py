"""Means, differences and ratios over seeds, with their intervals."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from scipy.stats import t as t_distribution

from intervals import CONFIDENCE


@dataclass(frozen=True)
class Estimate:
    """A mean, or a ratio of means, over seeds.

    Attributes:
        value: None where a seed diverged.
        low: lower end of the 95 % interval; None where there is none.
        high: upper end.
        std: sample standard deviation; None for ratios and with fewer than two seeds.
        without: why there is no interval.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    std: float | None = None
    without: str = field(default="one seed", compare=False)

    def interval(self, digits: int, scale: float = 1.0) -> str | None:
        """ "[low, high]"."""
        if self.low is None or self.high is None:
            return None
        return f"[{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"

    def shown(self, digits: int, scale: float = 1.0) -> str | None:
        """The value, and its interval, or why there is none."""
        if self.value is None:
            return None
        return f"{scale * self.value:.{digits}f} {self.interval(digits, scale) or f'({self.without})'}"

    @property
    def has_width(self) -> bool:
        """Whether there is an interval of more than a point: seeds that agree to the digit do not say how far others would be."""
        if self.low is None or self.high is None:
            return False
        return not math.isclose(self.low, self.high, rel_tol=1e-9, abs_tol=1e-12)


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
    half = _half_width(std / math.sqrt(len(numbers)), len(numbers) - 1)
    return Estimate(value, value - half, value + half, std)


def difference(of: Mapping[str, float | None], baseline: Mapping[str, float | None]) -> Estimate:
    """Mean of the difference between two methods, over the seeds that both have."""
    pairs = [(of[seed], baseline[seed]) for seed in of if seed in baseline]
    return mean([None if a is None or b is None else a - b for a, b in pairs])


def ratio(of: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Ratio of two methods' geometric means, with the interval that Welch's t distribution gives the difference of the mean logarithms.

        d = mean(log a) - mean(log b),    v = s_a^2 / n_a + s_b^2 / n_b,    exp(d - t_df sqrt(v)) .. exp(d + t_df sqrt(v))
        df = v^2 / ((s_a^2 / n_a)^2 / (n_a - 1) + (s_b^2 / n_b)^2 / (n_b - 1))

    Welch, "The generalization of 'Student's' problem when several different population variances are involved" (1947). It holds at two or
    three seeds, where a percentile bootstrap is far too narrow. Where a seed has 0, the ratio is that of the means, without an interval;
    nor is there one where all seeds of each method agree.

    Args:
        of: scores, none below 0.
        baseline: the same; None is returned if all of them are 0.

    Raises:
        ValueError: if a score is below 0.
    """
    if any(value < 0.0 for value in (*of, *baseline)):
        raise ValueError(f"ratio: found {min(*of, *baseline)}, allowed scores of 0 or more")
    if not of or not baseline or not any(baseline):
        return Estimate(None)
    if not all((*of, *baseline)):
        return Estimate(statistics.fmean(of) / statistics.fmean(baseline), without="a seed has 0; of the means")
    logs = [[math.log(value) for value in values] for values in (of, baseline)]
    d = statistics.fmean(logs[0]) - statistics.fmean(logs[1])
    if min(len(of), len(baseline)) < 2:
        return Estimate(math.exp(d))
    if len(set(of)) == len(set(baseline)) == 1:
        return Estimate(math.exp(d), without="no spread")
    shares = [statistics.variance(values) / len(values) for values in logs]
    v = sum(shares)
    df = v**2 / sum(share**2 / (len(values) - 1) for share, values in zip(shares, logs, strict=True))
    half = _half_width(math.sqrt(v), df)
    return Estimate(math.exp(d), math.exp(d - half), math.exp(d + half))


def _half_width(standard_error: float, degrees_of_freedom: float) -> float:
    return float(t_distribution.ppf(0.5 + CONFIDENCE / 2, degrees_of_freedom)) * standard_error
