"""The bootstrap behind every interval of a report."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import bootstrap

CONFIDENCE, NUM_RESAMPLES = 0.95, 9999
# values in a sample. Of an interquartile mean of normal values the interval covers 50 % at two, 74 at three, 89 at five and 93 at ten.
FEWEST_VALUES = 5


def percentile_interval(samples: Sequence[np.ndarray], statistic: Callable[..., np.ndarray]) -> tuple[float, float]:
    """Both ends of the percentile interval of a statistic; the same for the same samples.

    Args:
        samples: each resampled by itself.
        statistic: of all samples, along `axis`.
    """
    interval = bootstrap(
        samples,
        statistic,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)
