"""Numbers as a reader of a report wants them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from revprop.report.comparison import Paired

MINUS = "\u2212"


def signed(number: float | None, digits: int = 3) -> str | None:
    """Print a difference with its sign.

    Args:
        number: the difference, or None.
        digits: how many decimals; the paper prints accuracies in percent with three.

    Returns:
        Its text; None for None.

    Example:
        >>> signed(0.1234), signed(-0.5, 1) == f"{MINUS}0.5", signed(-0.0001), signed(None)
        ('+0.123', True, '0.000', None)
    """
    if number is None:
        return None
    text = f"{number:+.{digits}f}".replace("-", MINUS)
    return text if any(digit in "123456789" for digit in text) else text[1:]


def p_value(p: float | None) -> str | None:
    """Print a p-value with two significant digits.

    Args:
        p: the p-value, or None.

    Returns:
        Its text; None for None.

    Example:
        >>> p_value(0.0437), p_value(0.00001), p_value(1.0)
        ('0.044', '< 0.001', '1.00')
    """
    if p is None:
        return None
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def interval(paired: Paired | None, digits: int = 3) -> str | None:
    """Print the confidence interval of a difference.

    Args:
        paired: the comparison, or None.
        digits: how many decimals.

    Returns:
        Its text; None where there is no interval.

    Example:
        >>> interval(Paired(5, 0.1, (0.05, 0.15)), 2)
        '[+0.05, +0.15]'
    """
    if paired is None or paired.interval is None:
        return None
    return f"[{signed(paired.interval[0], digits)}, {signed(paired.interval[1], digits)}]"


def with_interval(paired: Paired | None, digits: int = 3) -> str | None:
    """Print a difference and its confidence interval.

    Args:
        paired: the comparison, or None.
        digits: how many decimals.

    Returns:
        Its text; None where there is no shared seed.

    Example:
        >>> with_interval(Paired(5, 0.1, (0.05, 0.15)), 2), with_interval(Paired(1, 0.1), 2)
        ('+0.10 [+0.05, +0.15]', '+0.10')
    """
    if paired is None or paired.mean is None:
        return None
    return " ".join(part for part in (signed(paired.mean, digits), interval(paired, digits)) if part)


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str | None:
    """Print the mean of some values and, of several, their sample standard deviation.

    Args:
        values: any number of them.
        digits: how many decimals.

    Returns:
        Its text; None for no value.

    Example:
        >>> mean_and_spread([61.0, 62.0, 66.0]), mean_and_spread([61.0]), mean_and_spread([])
        ('63.00 ± 2.65', '61.00', None)
    """
    if not values:
        return None
    spread = f" \u00b1 {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"
