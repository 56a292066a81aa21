"""Numbers as people read them."""


def short(count: int) -> str:
    """Three digits and a unit: 26,390,000,000 -> 26.4 B."""
    power = min(max(len(f"{count}") - 1, 0) // 3, 4)
    scaled = count / 1000**power
    return f"{scaled:.3g} {['', 'K', 'M', 'B', 'T'][power]}".strip() if power else str(count)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 3725 -> 1:02:05."""
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
