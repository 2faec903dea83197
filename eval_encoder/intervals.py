"""95 % intervals of reported figures, the one owner of their arithmetic for both probes.

    over clips or questions    `normal_half_width` for means, `bootstrap_bounds` for other figures
    over seeds of heads        `seed_half_width`, Student's t
    both                       `half_interval`, the one of the two that is reported

All figures are in percent. A half width h stands for the interval from mean - h to mean + h.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipeline.random import counter_rng

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom (any statistics table)
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
# 97.5 % quantile of the normal distribution, which Student's t approaches beyond the table
NORMAL975 = 1.96


def normal_half_width(deviation: float, count: int) -> float:
    """Half width for the mean of `count` shares with a standard deviation of `deviation`, by the
    normal approximation."""
    return float(100 * NORMAL975 * deviation / max(1, count) ** 0.5)


def seed_half_width(values: Sequence[float] | np.ndarray) -> float | None:
    """Half width for a mean over independent seeds; None for a single value."""
    count = len(values)
    if count < 2:
        return None
    # a sample of `count` values has count - 1 degrees of freedom, and T975 begins at one
    quantile = T975[count - 2] if count - 2 < len(T975) else NORMAL975
    deviation = np.std(values, ddof=1)
    return float(quantile * deviation / count**0.5)


def bootstrap_bounds(
    resampled: Callable[[np.random.Generator], Mapping[str, float]],
    purpose: str,
    resamplings: int,
) -> dict[str, tuple[float, float]]:
    """{figure: (lower, upper bound)}: quantiles over bootstrap samples.

    resampled: computes the figures of one sample, which it draws with replacement by the generator
    that it gets. purpose: names the draws, so that equal data always has equal bounds.
    """
    samples: dict[str, list[float]] = defaultdict(list)
    for number in range(resamplings):
        draw = counter_rng(0, purpose, number)
        for name, value in resampled(draw).items():
            samples[name].append(value)
    bounds = {}
    for name, values in samples.items():
        lower, upper = np.percentile(values, (2.5, 97.5)).tolist()
        bounds[name] = (lower, upper)
    return bounds


def half_interval(figures: Mapping) -> float:
    """Half width that is reported for the figures of a record: the larger one of that which the
    choice of validation clips leaves and that over the seeds."""
    return max(figures["ci95_clips"], figures.get("ci95_seeds") or 0.0)


def with_half_width(value: float, half_width: float) -> str:
    """`71.2 ± 2.9`, as tables show a figure."""
    return f"{value:.1f} ± {half_width:.1f}"
