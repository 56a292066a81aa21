"""Batches of positions, a model's states there, and the intervals that drawing units gives."""

import numpy as np
import pytest
import torch

from engram.config import UserError
from eval.bootstrap import percentiles
from eval.capture import Capture
from eval.cka import similarity as module
from eval.cka.hsic import StreamingHsic, cka, contributions, hsic
from eval.cka.positions import Positions, all_positions, check_stream, read_states, shuffled_batches
from eval.cka.similarity import Reading, Similarities, compare
from eval.points import Point
from tests.eval.models import build
from tests.eval.planted import documents, lively

LENGTHS = (9, 2, 17, 5, 30, 30, 12)


def test_batches_hold_every_position_once() -> None:
    positions = all_positions(documents(LENGTHS))
    total = sum(LENGTHS)
    groups = list(shuffled_batches(positions, batch=10, held=35, seed=1))
    batches = [batch for group in groups for batch in group]
    assert sorted(np.concatenate(batches).tolist()) == list(range(total))
    assert all(10 <= len(batch) <= 11 for batch in batches) and all(sum(map(len, group)) <= 35 for group in groups)
    # Mixed: a batch is of several rows, and no row is in more than two groups.
    assert np.mean([len(set(positions.row_N[batch])) for batch in batches]) > 2
    for row in range(len(LENGTHS)):
        assert sum(row in positions.row_N[np.concatenate(group)] for group in groups) <= 2
    again = [batch for group in shuffled_batches(positions, 10, 35, 1) for batch in group]
    other = [batch for group in shuffled_batches(positions, 10, 35, 2) for batch in group]
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(batches, other, strict=True))
    # Fewer positions than one batch are one batch.
    assert [len(batch) for group in shuffled_batches(positions, 1000, 35, 1) for batch in group] == [total]


@pytest.mark.parametrize("point", ["resid_post", "resid_memory", "attn_out"])
@pytest.mark.parametrize("stream", [None, 1])
def test_states_are_those_of_each_row_alone(point: Point, stream: int | None) -> None:
    if stream is not None and point == "attn_out":
        pytest.skip("has no streams")
    model, rows = lively(), documents(LENGTHS)
    positions = all_positions(rows)
    chosen = np.random.default_rng(0).permutation(sum(LENGTHS))[:40]
    heard: list[int] = []
    found = read_states(model, positions, chosen, point, stream, heard.append)
    for place, index in enumerate(chosen):
        row, position = rows[positions.row_N[index]], positions.position_N[index]
        with torch.no_grad(), Capture(model, [point]) as seen:
            model.hidden(torch.tensor([row]))
            for layer in range(3):
                x = seen[point, layer]
                if point != "attn_out":
                    x = model.merge(x) if stream is None else x[:, :, stream]
                torch.testing.assert_close(found[layer, place], x[0, position], rtol=1e-4, atol=1e-5)
    # Rows end at their last chosen position.
    ends: dict[int, int] = {}
    for index in chosen:
        ends[positions.row_N[index]] = max(ends.get(positions.row_N[index], 0), positions.position_N[index] + 1)
    assert sum(heard) == sum(ends.values())


def test_streams_that_are_not_there() -> None:
    model = build()
    check_stream(model, "resid_post", 1)
    check_stream(model, "attn_out", None)
    with pytest.raises(UserError, match="the model has 2 residual streams: give merged or 0 to 1"):
        check_stream(model, "resid_post", 2)
    with pytest.raises(UserError, match="attn_out has no residual streams"):
        check_stream(model, "attn_out", 0)


def test_models_are_compared_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers however much is held at once, and those of the batches done by hand."""
    models = [lively(), lively(num_layers=4, memory=None)]
    positions = all_positions(documents(LENGTHS))
    reading = Reading(batch=20, exact=True, seed=3)
    found = compare(models, [(1, 0)], positions, reading)
    every = np.arange(sum(LENGTHS))
    x, y = (read_states(model, positions, every) for model in models)
    batches = [batch for group in shuffled_batches(positions, 20, 10**6, 3) for batch in group]
    total = sum(contributions(y[:, batch], x[:, batch]).sum(0) for batch in batches).numpy()
    assert found.sums[1, 0].shape == (len(LENGTHS), 4, 3)
    np.testing.assert_allclose(found.sums[1, 0].sum(0), total, rtol=1e-4)
    assert found.counts.tolist() == list(LENGTHS)
    whole = [hsic(y, x).numpy(), hsic(y, y).diagonal().numpy(), hsic(x, x).diagonal().numpy()]
    np.testing.assert_allclose(found.exact[1, 0], cka(*whole), rtol=1e-4)
    same = found.sample((0, 0), draws=50)
    np.testing.assert_allclose(np.diagonal(same.draws, axis1=1, axis2=2), 1, atol=1e-9)

    monkeypatch.setattr(module, "_STATES", 21 * 7 * 16)
    parts = compare(models, [(1, 0)], positions, reading)
    np.testing.assert_allclose(parts.exact[1, 0], found.exact[1, 0], rtol=1e-4)


def test_unit_norm_forgets_sizes() -> None:
    model, rows = lively(), documents(LENGTHS)
    positions = all_positions(rows)
    readings = (Reading(batch=30), Reading(batch=30, unit_norm=True))
    found = [compare([model], [(0, 0)], positions, reading).sample((0, 0)) for reading in readings]
    x = torch.nn.functional.normalize(read_states(model, positions, np.arange(sum(LENGTHS))), dim=2)
    batches = [batch for group in shuffled_batches(positions, 30, 10**6, 0) for batch in group]
    own = sum(contributions(x[:, batch], x[:, batch]).sum(0) for batch in batches).numpy()
    np.testing.assert_allclose(found[1].value, cka(own, own.diagonal(), own.diagonal()), rtol=1e-3)
    assert np.abs(found[0].value - found[1].value).max() > 1e-3


def similarities(x: torch.Tensor, y: torch.Tensor) -> Similarities:
    """Of states [N, D] whose positions are the units, as one batch."""
    pairs = {(0, 1): (x, y), (0, 0): (x, x), (1, 1): (y, y)}
    sums = {pair: contributions(a[None], b[None]).numpy() for pair, (a, b) in pairs.items()}
    return Similarities(sums, np.ones(len(x)), {})


def test_intervals_cover_the_truth() -> None:
    """90 % intervals over entities hold the value of the whole population about nine times in ten."""

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(n, 6) * torch.tensor([2.0, 1, 1, 1, 0.5, 0.5])
        return x, torch.cat([x[:, :3], torch.randn(n, 3)], 1)

    whole = []
    x, y = draw(400_000)
    for a, b in ((x, y), (x, x), (y, y)):
        streamed = StreamingHsic()
        streamed.add(a[None], b[None])
        whole.append(streamed.value().item())
    truth = whole[0] / (whole[1] * whole[2]) ** 0.5
    covered = 0
    for seed in range(150):
        sample = similarities(*draw(120)).sample((0, 1), draws=300, seed=seed)
        interval = percentiles(sample.value, sample.draws, 0.9)
        covered += bool(interval.low[0, 0] <= truth <= interval.high[0, 0])
    assert 0.82 <= covered / 150 <= 0.97


def test_drawing_entities_twice_makes_no_similarity() -> None:
    """Draws of independent states lie around 0, where resampled copies would be alike."""
    sample = similarities(torch.randn(100, 200), torch.randn(100, 200)).sample((0, 1), draws=400)
    assert abs(sample.draws.mean()) < 0.1
    copies = torch.randint(100, (100,))
    x, y = torch.randn(100, 200)[copies], torch.randn(100, 200)[copies]
    assert similarities(x, y).sample((0, 1), draws=2).value > 0.3


def test_one_outlier_is_reported() -> None:
    x = torch.randn(100, 8)
    assert similarities(x, x).largest_share() < 0.2
    x[7] *= 30
    assert similarities(x, torch.randn(100, 8)).largest_share() > 0.8


def test_too_few_positions() -> None:
    with pytest.raises(UserError, match="4 positions in a batch"):
        compare([build()], [(0, 0)], all_positions([[1, 2, 3, 4]]), Reading())


def test_units_count_their_positions() -> None:
    row, position, unit = (np.array(part) for part in ([0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1]))
    found = compare([lively()], [(0, 0)], Positions(documents((2, 4)), row, position, unit), Reading())
    assert found.counts.tolist() == [2, 4] and found.sums[0, 0].shape == (2, 3, 3)
