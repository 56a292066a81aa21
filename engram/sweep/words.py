"""Findings in words: numbers with their certainty."""

from collections.abc import Sequence

from engram.sweep.paired import Difference

_NAMED = 3


def signed(value: float, digits: int = 3) -> str:
    """`+0.021`, with a minus as typesetters have it, and none before 0.000."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def interval(difference: Difference) -> str:
    """`−0.021 (−0.025 to −0.017)`; without the interval where there is none."""
    text = signed(difference.mean)
    if difference.low is None or difference.high is None:
        return text
    return f"{text} ({signed(difference.low)} to {signed(difference.high)})"


def compared(difference: Difference, other: str) -> str:
    """`0.021 nat below pure experts (0.017 to 0.025)`, or that this is not resolved."""
    low, high, sign = difference.low, difference.high, -1 if difference.mean < 0 else 1
    text = f"{abs(difference.mean):.3f} nat {'below' if sign < 0 else 'above'} {other}"
    if low is None or high is None:
        return f"{text} (one seed: not resolved)"
    if not difference.resolved:
        return f"{text} (not resolved: {signed(low)} to {signed(high)})"
    ends = sorted((sign * low, sign * high))
    return f"{text} ({ends[0]:.3f} to {ends[1]:.3f})"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`, or how many there are."""
    if len(names) > _NAMED:
        return f"{len(names)} others"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
