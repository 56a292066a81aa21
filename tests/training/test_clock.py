import pytest

from engram.training.clock import Clock


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def test_pauses_do_not_slow_the_speed_but_delay_the_end(time: list[float]) -> None:
    clock = Clock(step=10, tokens_per_step=50)
    time[0] += 4
    with clock.paused():
        time[0] += 6
    # Four steps of 50 tokens in 4 seconds of training.
    assert clock.lap(14) == 50.0
    # 14 steps remain, at 10 seconds for four.
    assert clock.seconds_left(14, last_step=28) == 35.0
    time[0] += 2
    # Only the time since the last lap counts, and for the end only that since the first estimate.
    assert clock.lap(15) == 25.0
    assert clock.seconds_left(15, last_step=28) == 26.0
