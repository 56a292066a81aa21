import pytest
import torch

from engram.config import HyperConnectionConfig
from engram.kernels.mhc_pre_post import mhc_post
from engram.model.hyper_connection import HyperConnection, Readout, ResidualConnection, expand


def _connection(streams: int = 4, index: int = 1, **settings: float) -> HyperConnection:
    connection = HyperConnection(HyperConnectionConfig(hc_mult=streams, **settings), 16, 1e-6, index)
    torch.nn.init.normal_(connection.weight, std=0.02)
    with torch.no_grad():
        connection.bias.copy_(connection.initial_bias())
    return connection


def _randomise(connection: HyperConnection) -> HyperConnection:
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter.normal_(std=0.7)
    return connection


def test_forward_equals_loops_over_tokens_and_streams() -> None:
    connection = _randomise(_connection(3))
    x = torch.randn(2, 5, 3, 16)
    weight_in = torch.randn(16, 16)
    actual = connection(x, lambda u: u @ weight_in)
    for b in range(2):
        for t in range(5):
            flat = x[b, t].flatten()
            logits = connection.weight @ (flat / (flat.square().mean() + 1e-6).sqrt())
            pre = torch.sigmoid(logits[:3] * connection.scale[0] + connection.bias[:3])
            post = 2 * torch.sigmoid(logits[3:6] * connection.scale[1] + connection.bias[3:6])
            mixing = torch.exp((logits[6:] * connection.scale[2] + connection.bias[6:]).view(3, 3))
            for _ in range(20):
                mixing = mixing / mixing.sum(0, keepdim=True)
                mixing = mixing / mixing.sum(1, keepdim=True)
            y = sum(pre[i] * x[b, t, i] for i in range(3)) @ weight_in
            for o in range(3):
                expected = sum(mixing[o, i] * x[b, t, i] for i in range(3)) + post[o] * y
                torch.testing.assert_close(actual[b, t, o], expected, atol=2e-5, rtol=2e-5)


def test_mix_contracts_the_axis_that_sums_to_one() -> None:
    """Streams that agree stay as they are, however far Sinkhorn is from converging."""
    connection = _randomise(_connection(4, sinkhorn_steps=1))
    x = torch.randn(2, 3, 16).unsqueeze(2).expand(-1, -1, 4, -1)
    _, _, h_res = connection.coefficients(x)
    nothing = torch.zeros(2, 3, 16), torch.zeros(2, 3, 4)
    torch.testing.assert_close(mhc_post(x, *nothing, h_res), x, atol=1e-5, rtol=1e-5)
    transposed = mhc_post(x, *nothing, h_res.transpose(2, 3))
    assert (transposed - x).abs().max() > 0.01


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_streams_that_agree_stay_as_they_are_over_many_layers(dtype: torch.dtype, tolerance: float) -> None:
    """Rows that sum to 0.87 instead of 1 would leave nothing after 60 layers."""
    start = torch.randn(4, 6, 1, 16).expand(-1, -1, 4, -1).to(dtype)
    x = start
    for layer in range(60):
        x = _randomise(_connection(4, layer))(x, torch.zeros_like)
    assert (x - start).abs().max() <= tolerance * start.abs().max()


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_initial_coefficients_are_near_the_identity(streams: int) -> None:
    connection = _connection(streams, index=5)
    h_pre, h_post, h_res = connection.coefficients(torch.randn(2, 3, streams, 16))
    torch.testing.assert_close(h_pre.sum(-1), torch.ones(2, 3), atol=0.03, rtol=0)
    assert (h_pre.argmax(-1) == 5 % streams).all()
    torch.testing.assert_close(h_post, torch.ones_like(h_post), atol=0.02, rtol=0)
    identity = torch.eye(streams).expand_as(h_res)
    torch.testing.assert_close(h_res, identity, atol=0.005, rtol=0)


def test_initial_mixing_keeps_differences_between_streams() -> None:
    x = torch.randn(1, 8, 4, 16)
    y = x
    for layer in range(20):
        y = _connection(4, layer)(y, lambda u: torch.zeros_like(u))
    torch.testing.assert_close(y, x, atol=0.2, rtol=0)


def test_readout_starts_as_the_mean() -> None:
    for streams in (2, 4):
        readout = Readout(HyperConnectionConfig(hc_mult=streams), 16, 1e-6)
        torch.nn.init.normal_(readout.weight, std=0.02)
        with torch.no_grad():
            readout.bias.copy_(readout.initial_bias())
        x = torch.randn(2, 3, streams, 16)
        torch.testing.assert_close(readout(x), x.mean(2), atol=0.02, rtol=0)


def test_plain_residual() -> None:
    x = torch.randn(2, 3, 1, 16)
    torch.testing.assert_close(ResidualConnection()(x, lambda u: 3 * u), 4 * x)
    assert torch.equal(expand(x.squeeze(2), 4)[:, :, 2], x.squeeze(2))
