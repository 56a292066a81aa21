"""Numbers as people read them."""


def short(count: int) -> str:
    """Three digits and a unit: 26,390,000,000 -> 26.4 B."""
    power = min(max(len(f"{count}") - 1, 0) // 3, 4)
    scaled = count / 1000**power
    return f"{scaled:.3g} {['', 'K', 'M', 'B', 'T'][power]}".strip() if power else str(count)


def duration(seconds: float) -> str:
    """Days, hours, minutes and seconds: 3725 -> 1:02:05, 90000 -> 1 d 1:00:00."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days:,} d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def counted(count: int, noun: str) -> str:
    """`1 run`, `3 runs`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
