"""Generation against recomputation, and the distribution that it samples from."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.config import ModelConfig, UserError
from engram.inference.cache import Decoder
from engram.inference.generate import choose, generate
from engram.model.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(
        num_layers=2,
        hidden_size=16,
        vocab_size=37,
        attention={"num_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6},
        moe={"num_experts": 4, "top_k": 2, "expert_dim": 8},
        hyper_connection={"hc_mult": 2},
        memory={"layer_ids": [1], "num_heads": 2, "head_dim": 4, "rows_per_head": 31, "conv": {"zero_init": False}},
    )
    torch.manual_seed(5)
    model = Transformer(config)
    with torch.no_grad():
        # Peaked distributions, so that the likeliest token changes with the context.
        model.head.weight.mul_(40)
    return model


@torch.no_grad()
def test_temperature_zero_is_the_argmax_of_full_recomputation(model: Transformer) -> None:
    prompt = torch.randint(0, 37, (3, 5))
    expected = prompt
    model.eval()
    for _ in range(20):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    found = generate(model, prompt, 20, temperature=0)
    assert torch.equal(found, expected)
    assert len(set(found[:, 5:].flatten().tolist())) > 3


def test_samples_depend_on_seed_and_row_only(model: Transformer) -> None:
    prompt = [[3, 1, 4, 1, 5]]
    options = {"temperature": 30.0, "seed": 7}
    first = generate(model, prompt, 24, **options)
    assert torch.equal(first, generate(model, prompt, 24, **options))
    assert not torch.equal(first, generate(model, prompt, 24, temperature=30.0, seed=8))
    # A neighbour, a longer continuation and the global generator change nothing.
    torch.manual_seed(99)
    assert torch.equal(first[0], generate(model, prompt + [[9, 9, 9, 9, 9]], 24, **options)[0])
    assert torch.equal(first[0, :15], generate(model, prompt, 10, **options)[0])
    # The second row of equal prompts is another sample.
    both = generate(model, prompt * 2, 24, **options)
    assert not torch.equal(both[0], both[1])


def test_rows_stop_at_the_end_of_document(model: Transformer) -> None:
    prompt = torch.randint(0, 37, (4, 3))
    free = generate(model, prompt, 30, temperature=40.0, seed=1)
    eos = int(free[0, 9])
    found = generate(model, prompt, 30, temperature=40.0, seed=1, eos_id=eos)
    ends = [row[3:].tolist().index(eos) if eos in row[3:].tolist() else 30 for row in free]
    assert found.shape[1] == 3 + min(max(ends) + 1, 30)
    for row, end in enumerate(ends):
        kept = min(3 + end + 1, found.shape[1])
        assert torch.equal(found[row, :kept], free[row, :kept])
        assert (found[row, kept:] == eos).all()


def test_training_mode_is_restored(model: Transformer) -> None:
    model.train()
    generate(model, [[1, 2]], 2)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [[]]}, "the prompt is empty"),
        ({"tokens": [[3, 37]]}, "token 37, but the model's ids are 0 to 36"),
        ({"tokens": [[-1]]}, "token -1, but the model's ids are 0 to 36"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_k": 0}, "top_k is 0, but must be 1 to 37"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ],
)
def test_user_errors(model: Transformer, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, **{"tokens": [[1]], "max_new_tokens": 2, **arguments})


def test_no_new_tokens_is_the_prompt(model: Transformer) -> None:
    assert generate(model, [[1, 2]], 0).tolist() == [[1, 2]]


LOGITS = torch.tensor([[0.1, 2.0, -1.0, 1.5, 0.3]])


def distribution(**options) -> torch.Tensor:
    """Shares of the tokens over a fine grid of uniform numbers."""
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    chosen = choose(LOGITS.expand(len(grid), -1), grid, **options)
    return torch.bincount(chosen, minlength=5) / len(grid)


def test_sampling_follows_the_softmax() -> None:
    torch.testing.assert_close(distribution(temperature=1.0), torch.softmax(LOGITS[0], -1), atol=2e-4, rtol=0)
    torch.testing.assert_close(distribution(temperature=0.5), torch.softmax(LOGITS[0] * 2, -1), atol=2e-4, rtol=0)


def test_top_k_keeps_the_likeliest() -> None:
    kept = torch.softmax(torch.tensor([-torch.inf, 2.0, -torch.inf, 1.5, 0.3]), -1)
    torch.testing.assert_close(distribution(temperature=1.0, top_k=3), kept, atol=2e-4, rtol=0)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    # Probabilities 0.47, 0.28, 0.09, 0.07, 0.02 ... of tokens 1, 3, 4, 0, 2.
    two = torch.softmax(torch.tensor([-torch.inf, 2.0, -torch.inf, 1.5, -torch.inf]), -1)
    p = torch.softmax(LOGITS[0], -1)
    assert p[1] < 0.6 < p[1] + p[3]
    torch.testing.assert_close(distribution(temperature=1.0, top_p=0.6), two, atol=2e-4, rtol=0)
    assert distribution(temperature=1.0, top_p=0.01).tolist() == [0, 1, 0, 0, 0]
    torch.testing.assert_close(distribution(temperature=1.0, top_p=1.0), p, atol=2e-4, rtol=0)


@given(
    st.lists(st.floats(-30, 30), min_size=2, max_size=9),
    st.floats(0, 1, exclude_max=True),
    st.floats(0.05, 10),
    st.integers(1, 2),
)
def test_a_choice_is_always_among_the_kept(logits: list[float], uniform: float, temperature: float, k: int) -> None:
    row = torch.tensor([logits])
    chosen = int(choose(row, torch.tensor([uniform], dtype=torch.float64), temperature, top_k=k))
    assert row[0, chosen] >= row[0].sort(descending=True).values[k - 1]


@pytest.mark.gpu
@pytest.mark.parametrize("eos_id", [None, 5])
def test_a_gpu_continues_as_the_cpu_does(model: Transformer, eos_id: int | None) -> None:
    prompt = torch.randint(0, 37, (4, 6))
    expected = generate(model, prompt, 40, temperature=0, eos_id=eos_id)
    found = generate(copy.deepcopy(model).cuda(), prompt, 40, temperature=0, eos_id=eos_id)
    assert found.device.type == "cuda" and torch.equal(found.cpu(), expected)


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_decodes_in_parts_as_the_cpu_does_at_once(model: Transformer) -> None:
    tokens = torch.randint(0, 37, (3, 21))
    expected = model.eval()(tokens)
    decoder, start = Decoder(copy.deepcopy(model).cuda(), 3, 21), 0
    for part in (5, 1, 1, 9, 5):
        found = decoder.feed(tokens[:, start : start + part].cuda())
        start += part
        torch.testing.assert_close(found.cpu(), expected[:, start - 1], rtol=1e-4, atol=1e-3)
