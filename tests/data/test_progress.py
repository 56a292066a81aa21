import io

from rich.console import Console

from engram.data.progress import Progress


def test_lines_and_bars_are_shown() -> None:
    screen = io.StringIO()
    progress = Progress(Console(file=screen, width=100))
    progress.say("folder: [prepared] " + "x" * 200)
    with progress.bar("reading", total=None) as advance:
        advance(2_000_000)
    shown = screen.getvalue()
    assert "folder: [prepared] " + "x" * 200 in shown
    assert "reading" in shown and "2.0/2.0 MB" in shown


def test_silence() -> None:
    progress = Progress()
    progress.say("nothing")
    with progress.bar("nothing", 3) as advance:
        advance(1)
