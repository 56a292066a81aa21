"""Unbiased HSIC and CKA against their definitions, and what they must be blind to."""

import pytest
import torch
from torch import Tensor

from engram.config import UserError
from eval.cka import hsic as module
from eval.cka.hsic import StreamingHsic, centred, cka, contributions, hsic


def definition(x_ND: Tensor, y_NE: Tensor) -> Tensor:
    """From the whole kernels, term by term."""
    n, ones = len(x_ND), torch.ones(len(x_ND), dtype=torch.float64)
    k, low = x_ND.double() @ x_ND.double().T, y_NE.double() @ y_NE.double().T
    k, low = k - k.diag().diag(), low - low.diag().diag()
    total = (k @ low).trace() + (ones @ k @ ones) * (ones @ low @ ones) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (ones @ k @ low @ ones)) / (n * (n - 3))


def similarity(x_PND: Tensor, y_QNE: Tensor) -> Tensor:
    own = [hsic(z, z).diagonal().numpy() for z in (x_PND, y_QNE)]
    return torch.from_numpy(cka(hsic(x_PND, y_QNE).numpy(), *own))


def states(n: int = 50) -> tuple[Tensor, Tensor]:
    """Three layers of width 6, and two of width 4 that share something with them."""
    x = torch.randn(3, n, 6)
    return x, x[:2, :, :4] + torch.randn(2, n, 4)


def test_every_pair_of_layers_is_the_definition() -> None:
    x, y = states()
    expected = torch.stack([torch.stack([definition(a, b) for b in y]) for a in x])
    torch.testing.assert_close(hsic(x, y), expected, rtol=0, atol=1e-10)


def test_contributions_are_what_leaving_a_position_out_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = states(11)
    # Two rows of the kernels at a time.
    monkeypatch.setattr(module, "_KERNEL", 2 * 5 * 11)
    found = contributions(x, y)
    torch.testing.assert_close(found.mean(0), hsic(x, y), rtol=0, atol=1e-10)
    for i in range(11):
        kept = torch.arange(11) != i
        left = torch.stack([torch.stack([definition(a[kept], b[kept]) for b in y]) for a in x])
        torch.testing.assert_close(found[i], 11 * hsic(x, y) - 10 * left, rtol=0, atol=1e-10)


def test_streaming_is_the_whole_kernel() -> None:
    x, y = states()
    found = StreamingHsic()
    for part in torch.arange(50).split(7):
        # Neither the chunks nor a common offset matter.
        found.add(x[:, part].double() + 3, y[:, part].double() - 100)
    torch.testing.assert_close(found.value(), hsic(x, y), rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", [3, 64])
def test_a_state_is_like_itself_turned_scaled_and_moved(width: int) -> None:
    x, y = torch.randn(1, 40, width), torch.randn(1, 40, 5)
    turn = torch.linalg.qr(torch.randn(width, width)).Q
    moved = 7 * x @ turn + 3 * torch.randn(width)
    assert similarity(x, x).item() == pytest.approx(1, abs=1e-12)
    assert similarity(x, moved).item() == pytest.approx(1, abs=1e-5)
    assert similarity(moved, y).item() == pytest.approx(similarity(x, y).item(), abs=1e-5)
    # But not to any linear map.
    assert similarity(x, x * torch.linspace(0.1, 3, width)).item() < 0.98


def test_it_is_symmetric() -> None:
    x, y = states()
    torch.testing.assert_close(similarity(x, y), similarity(y, x).T, rtol=0, atol=1e-12)


def test_independent_states_are_not_alike_however_wide() -> None:
    drawn = torch.stack([similarity(torch.randn(1, 64, 512), torch.randn(1, 64, 512)) for _ in range(30)]).flatten()
    assert abs(drawn.mean()) < 3 * drawn.std() / 30**0.5
    x, y = centred(torch.randn(1, 64, 512))[0], centred(torch.randn(1, 64, 512))[0]
    biased = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert biased > 0.8 and drawn.abs().max() < 0.1


def test_batches_are_a_ratio_of_means() -> None:
    """Batches of four positions are unbiased as a ratio of means; a mean of ratios is too small."""
    x = torch.randn(1, 4000, 16)
    y = x + 0.7 * torch.randn(1, 4000, 16)
    streamed = []
    for a, b in ((x, y), (x, x), (y, y)):
        whole = StreamingHsic()
        whole.add(a, b)
        streamed.append(whole.value().item())
    truth = streamed[0] / (streamed[1] * streamed[2]) ** 0.5
    parts = torch.stack(
        [
            torch.stack([hsic(a, b), hsic(a, a), hsic(b, b)]).flatten()
            for a, b in zip(x.split(4, 1), y.split(4, 1), strict=True)
        ]
    )
    means = parts.mean(0)
    assert means[0] / (means[1] * means[2]).sqrt() == pytest.approx(truth, abs=0.03)
    valid = parts[(parts[:, 1:] > 0).all(1)]
    assert (valid[:, 0] / (valid[:, 1] * valid[:, 2]).sqrt()).mean() < truth - 0.04


def test_a_large_common_offset_in_float32_changes_nothing() -> None:
    x, y = states(300)
    truth = similarity(x, y)
    far_x, far_y = x + 1000, y - 1000
    torch.testing.assert_close(similarity(far_x, far_y), truth, rtol=0, atol=1e-4)
    streamed = StreamingHsic()
    for part in torch.arange(300).split(100):
        streamed.add(far_x[:, part], far_y[:, part])
    torch.testing.assert_close(streamed.value(), hsic(x, y), rtol=1e-4, atol=1e-4)


def test_repeated_positions_look_alike() -> None:
    """Independent states of 64 entities, each 8 times: why every entity is taken once."""
    x, y = torch.randn(1, 64, 512), torch.randn(1, 64, 512)
    assert abs(similarity(x, y).item()) < 0.2
    assert similarity(x.repeat(1, 8, 1), y.repeat(1, 8, 1)).item() > 0.8


def test_states_that_do_not_differ_have_no_similarity() -> None:
    x, y = states()
    x[1] = torch.randn(6)
    found = similarity(x, y)
    assert found[1].isnan().all() and not found[[0, 2]].isnan().any()
    assert contributions(x, y)[:, 1].abs().max() == 0


def test_too_few_positions_are_refused() -> None:
    x, y = states(4)
    assert hsic(x, y).isfinite().all()
    with pytest.raises(UserError, match="4 positions in a batch: its interval needs 5 at least"):
        contributions(x, y)
    with pytest.raises(UserError, match="3 positions in a batch: the unbiased HSIC needs 4 at least"):
        hsic(x[:, :3], y[:, :3])
    streamed = StreamingHsic()
    streamed.add(x[:, :3], y[:, :3])
    with pytest.raises(UserError, match="3 positions"):
        streamed.value()


def test_the_streaming_form_refuses_what_it_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PRODUCTS", 3 * 6 * 2 * 4 - 1)
    with pytest.raises(UserError, match="leave --exact away"):
        StreamingHsic().add(*states())
