"""The estimate of distinct rows: Zipf's law summed type by type, and simulated draws."""

import numpy as np
import pytest

from engram.distributed.distinct_rows import rows_by_zipf, types_by_zipf
from engram.distributed.plan import make_plan
from tests.distributed.plans import tiny


@pytest.mark.parametrize(("draws", "types"), [(1, 4), (7, 5), (100, 1000), (3000, 30_000), (100_000, 30_000)])
def test_types_are_summed_one_by_one(draws: int, types: int) -> None:
    places = np.arange(1, types + 1)
    chances = 1 / places / (1 / places).sum()
    assert types_by_zipf(draws, types) == pytest.approx((1 - (1 - chances) ** draws).sum(), rel=1e-5)


def test_one_draw_is_one_type_of_any_number() -> None:
    assert types_by_zipf(1, 129_280**3) == pytest.approx(1, rel=1e-9)


def test_rows_are_those_of_simulated_n_grams() -> None:
    config = tiny(model={"vocab_size": 12, "memory": {"rows_per_head": 400, "layer_ids": [1]}})
    [table] = make_plan(config, 1).tables
    rng = np.random.default_rng(0)
    tokens, rows, found = 700, range(300, 2000), []
    for _ in range(40):
        count = first = 0
        for order, size in table.heads:
            types = 12**order
            chances = 1 / np.arange(1, types + 1)
            # Each n-gram has its row, and heads have nothing in common.
            read = rng.integers(size, size=types)[rng.choice(types, tokens, p=chances / chances.sum())] + first
            count += len(set(read.tolist()) & set(rows))
            first += size
        found.append(count)
    assert rows_by_zipf(table, rows, 12, tokens) == pytest.approx(np.mean(found), rel=0.02)
    assert rows_by_zipf(table, rows, 12, tokens) < table.rows_at_most(rows, tokens)
