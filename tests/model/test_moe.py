import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.config import MoEConfig
from engram.model.moe import MoE, Router, sequence_balance_loss


def _router(config: MoEConfig, hidden: int = 12) -> Router:
    router = Router(config, hidden)
    torch.nn.init.normal_(router.weight)
    return router


def _moe(config: MoEConfig, hidden: int = 16) -> MoE:
    moe = MoE(config, hidden)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def test_router_weighs_by_affinity_and_chooses_by_affinity_plus_bias() -> None:
    router = _router(MoEConfig(num_experts=4, top_k=2, expert_dim=8, routed_scaling_factor=2.5))
    router.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 10.0]))
    x = torch.randn(9, 12)
    weights, ids, _ = router(x)
    affinity = torch.sigmoid(x @ router.weight.T)
    for token in range(9):
        best_of_rest = affinity[token, :3].argmax()
        assert set(ids[token].tolist()) == {3, int(best_of_rest)}
        chosen = affinity[token, ids[token]]
        torch.testing.assert_close(weights[token], 2.5 * chosen / chosen.sum())


def test_groups_limit_the_choice() -> None:
    config = MoEConfig(num_experts=6, top_k=2, expert_dim=8, num_groups=3, top_k_groups=1)
    router = _router(config)
    x = torch.randn(40, 12)
    _, ids, _ = router(x)
    affinity = torch.sigmoid(x @ router.weight.T)
    for token in range(40):
        scores = affinity[token].view(3, 2).sum(1)
        assert set((ids[token] // 2).tolist()) == {int(scores.argmax())}


@given(st.integers(1, 60), st.integers(1, 6), st.data())
def test_load_counts_every_choice_once(tokens: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    moe = _moe(MoEConfig(num_experts=experts, top_k=top_k, expert_dim=8))
    assert moe(torch.randn(1, tokens, 16)).load.sum() == tokens * top_k
    assert moe.eval()(torch.randn(1, tokens, 16)).load is None


def test_bias_moves_against_the_load_and_balances_it() -> None:
    router = _router(MoEConfig(num_experts=3, top_k=1, expert_dim=8, bias_update_speed=0.01))
    router.load.copy_(torch.tensor([5.0, 1.0, 3.0]))
    router.update_bias()
    torch.testing.assert_close(router.bias, torch.tensor([-0.01, 0.01, 0.0]))
    assert (router.load == 0).all()

    torch.nn.init.normal_(router.weight, std=0.1)
    x = torch.randn(400, 12) + 1.0

    def imbalance() -> float:
        counts = torch.bincount(router(x)[1].flatten(), minlength=3).float()
        router.load.copy_(counts)
        return float(counts.max() / counts.mean())

    before = imbalance()
    for _ in range(200):
        imbalance()
        router.update_bias()
    assert imbalance() < min(before, 1.25)


def test_output_is_routed_plus_shared() -> None:
    moe = _moe(MoEConfig(num_experts=4, top_k=4, expert_dim=8, num_shared_experts=2)).eval()
    x = torch.randn(2, 5, 16)
    weights, ids, _ = moe.router(x.flatten(0, 1))
    expected = moe.shared(x.flatten(0, 1))
    for token in range(10):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            gate, up = moe.experts.gate_up[expert]
            u = x.flatten(0, 1)[token]
            hidden = torch.nn.functional.silu(gate @ u) * (up @ u)
            expected[token] = expected[token] + weight * (moe.experts.down[expert] @ hidden)
    torch.testing.assert_close(moe(x).output.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)


def test_narrowed_and_absent_shared_experts() -> None:
    narrow = MoE(MoEConfig(num_experts=2, top_k=1, expert_dim=8, num_shared_experts=1, shared_dim=3), 16)
    assert narrow.shared.down.weight.shape == (16, 3)
    assert MoE(MoEConfig(num_experts=2, top_k=1, expert_dim=8, num_shared_experts=0), 16).shared is None


def test_balance_loss_of_balanced_and_collapsed_routing() -> None:
    config = MoEConfig(num_experts=4, top_k=1, expert_dim=8, sequence_balance_loss=0.5)
    balanced = torch.eye(4).repeat(3, 1).unsqueeze(0)
    even = torch.full((1, 12, 4), 0.3)
    assert sequence_balance_loss(even, balanced, config).item() == pytest.approx(0.5)
    collapsed = torch.zeros(1, 12, 4)
    collapsed[..., 2] = 1
    assert sequence_balance_loss(collapsed, collapsed, config).item() == pytest.approx(2.0)
