import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.config import OptimConfig, ScheduleConfig
from engram.optim.schedule import learning_rate


def lr(step: int, total: int = 100, peak: float = 1.0, **schedule: object) -> float:
    return learning_rate(step, OptimConfig(lr=peak, schedule=ScheduleConfig(**schedule)), total)  # type: ignore[arg-type]


def test_warmup_rises_from_above_zero_to_the_peak() -> None:
    assert [lr(step, peak=0.4, warmup_steps=4) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert lr(0, warmup_steps=0) == 1.0


@pytest.mark.parametrize("total", [10, 100, 50_000, 770])
def test_paper_step_decay(total: int) -> None:
    eighty, ninety = total * 8 // 10, total * 9 // 10
    assert lr(eighty - 1, total) == 1.0
    assert lr(eighty, total) == 0.316
    assert lr(ninety - 1, total) == 0.316
    assert lr(ninety, total) == 0.1
    assert lr(total - 1, total) == 0.1


def test_cosine() -> None:
    values = [lr(step, 111, kind="cosine", warmup_steps=10, final_factor=0.2) for step in range(111)]
    assert values[9] == values[10] == 1.0
    assert values[60] == pytest.approx(0.6)
    assert values[35] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert values[110] == pytest.approx(0.2)


def test_wsd_decays_linearly_over_the_last_steps() -> None:
    values = [lr(step, 100, kind="wsd", warmup_steps=5, final_factor=0.1, decay_fraction=0.2) for step in range(100)]
    assert values[4:80] == [1.0] * 76
    assert values[79:] == pytest.approx([0.1 + 0.9 * left / 20 for left in range(20, -1, -1)])
    assert lr(99, kind="wsd", decay_fraction=0.0) == 1.0


def test_constant() -> None:
    assert [lr(step, kind="constant", warmup_steps=2) for step in (0, 1, 50, 99)] == [0.5, 1.0, 1.0, 1.0]


@given(
    kind=st.sampled_from(["step", "cosine", "wsd", "constant"]),
    total=st.integers(1, 300),
    warmup=st.integers(0, 400),
    fraction=st.floats(0, 1),
    final=st.floats(0.01, 1),
    data=st.data(),
)
def test_stays_above_zero_and_at_most_the_peak(
    kind: str, total: int, warmup: int, fraction: float, final: float, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, total + 5))
    value = lr(step, total, kind=kind, warmup_steps=warmup, decay_fraction=fraction, final_factor=final)
    assert 0 < value <= 1 + 1e-12
