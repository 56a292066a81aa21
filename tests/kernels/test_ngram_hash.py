"""`ngram_hash`: every implementation bit by bit against the reference, and the reference against Python's integers."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engram.kernels.choose import Implementation
from engram.kernels.ngram_hash import ngram_hash, ngram_hash_ref
from tests.reference import engram_loops as loops

FAST: tuple[Implementation, ...] = ("native", "triton")
VOCABULARY = 50


def recipe(layers: int, longest: int, heads: int, primes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Multipliers, primes (taken from the list in turn) and offsets."""
    bound = (2**63 - 1) // VOCABULARY // 2
    count = layers * (longest - 1) * heads
    taken = torch.tensor([primes[index % len(primes)] for index in range(count)])
    offsets = torch.randint(0, 2**40, (layers, (longest - 1) * heads))
    return (
        torch.randint(0, bound, (layers, longest)) * 2 + 1,
        taken.view(layers, longest - 1, heads),
        offsets,
    )


def tokens_and_documents(batch: int, length: int, largest: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    # A negative id is dead, whatever its size.
    tokens = torch.randint(-3, largest, (batch, length))
    return tokens, (torch.rand(batch, length) < 0.2).long().cumsum(1)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("stop_at_pad", [False, True])
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 3, 8, 1, 70), (2, 4, 8, 3, 9), (3, 2, 1, 2, 65), (1, 4, 5, 1, 1), (1, 3, 16, 2, 3)]
)
def test_equals_the_reference(shape: tuple[int, ...], isolated: bool, stop_at_pad: bool, impl: Implementation) -> None:
    layers, longest, heads, batch, length = shape
    constants = recipe(layers, longest, heads, [646_411, 2_262_409, 16_000_057])
    tokens, documents = tokens_and_documents(batch, length, 90)
    token_map = torch.randint(0, VOCABULARY, (90,))
    options: dict[str, Any] = dict(pad_id=2, stop_at_pad=stop_at_pad, token_map=token_map)
    inputs = tokens, documents if isolated else None, *constants
    expected = ngram_hash_ref(*inputs, **options)
    assert torch.equal(ngram_hash(*inputs, **options, impl=impl), expected)
    plain = (*inputs[:4], None)
    assert torch.equal(ngram_hash(*plain, **options, impl=impl), ngram_hash_ref(*plain, **options))


def test_the_reference_equals_the_loops() -> None:
    multipliers, primes, offsets = recipe(2, 4, 3, [101, 646_411, 7])
    tokens, documents = tokens_and_documents(2, 40)
    result = ngram_hash_ref(tokens, documents, multipliers, primes, None, pad_id=2, stop_at_pad=False)
    for layer in range(2):
        for row, ids, own in zip(result[layer], tokens.tolist(), documents.tolist(), strict=True):
            constants = multipliers[layer].tolist(), primes[layer].tolist()
            assert row.tolist() == loops.hash_ids(ids, *constants, 2, "segment", own)


@pytest.mark.parametrize("impl", ["reference", *FAST])
@given(
    st.lists(st.integers(2, 2**62), min_size=8, max_size=8),
    st.lists(st.integers(0, 2**63 - 1) | st.integers(2**63 - 2**10, 2**63 - 1), min_size=3, max_size=3),
)
def test_remainders_are_exact(impl: Implementation, primes: list[int], numbers: list[int]) -> None:
    """Also of multiples and their neighbours; with the multipliers 1 and 0, an id is its own mix."""
    for prime in primes:
        numbers = [*numbers, *(k for k in (prime - 1, prime, prime + 1, (2**63 - 1) // prime * prime) if k < 2**63)]
    result = ngram_hash(
        torch.tensor(numbers)[:, None],
        None,
        torch.tensor([[1, 0]]),
        torch.tensor([[primes]]),
        None,
        pad_id=0,
        stop_at_pad=False,
        impl=impl,
    )
    assert result[0, :, 0].tolist() == [[number % prime for prime in primes] for number in numbers]


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("smallest", [2, 3, 127, 2**14 - 3, 2**14 + 27, 2**31 - 1, 2**31 + 11, 2**53 + 5, 2**61 - 1])
def test_primes_of_every_size(smallest: int, impl: Implementation) -> None:
    """Eight heads above 2^14 take the vectorised path; one small prime among them takes the longer one."""
    multipliers = torch.tensor([[2**63 - 1, 0], [2**63 - 25, 0], [2**62, 0], [smallest * 3, 0], [smallest - 1, 0]])
    primes = torch.tensor([smallest, *([2**31 + 11, 16_411] * 4)][:8]).expand(5, 1, 8).contiguous()
    result = ngram_hash(torch.tensor([[1]]), None, multipliers, primes, None, pad_id=0, stop_at_pad=False, impl=impl)
    numbers = multipliers[:, 0].tolist()
    assert result[:, 0, 0].tolist() == [[number % prime for prime in primes[0, 0].tolist()] for number in numbers]


@pytest.mark.parametrize("impl", FAST)
@given(st.data())
def test_any_shape(impl: Implementation, data: st.DataObject) -> None:
    layers, batch = (data.draw(st.integers(1, most)) for most in (3, 3))
    longest, heads, length = (data.draw(st.integers(*bounds)) for bounds in ((2, 8), (1, 16), (1, 20)))
    constants = recipe(layers, longest, heads, data.draw(st.sampled_from([[11], [646_411, 646_421], [5, 2**33 + 17]])))
    tokens, documents = tokens_and_documents(batch, length)
    # A column of a wider batch, as decoding passes it.
    tokens = torch.cat((tokens, tokens), dim=1)[:, length:]
    inputs = tokens, documents if data.draw(st.booleans()) else None, *constants
    options: dict[str, Any] = dict(pad_id=2, stop_at_pad=data.draw(st.booleans()))
    assert torch.equal(ngram_hash(*inputs, **options, impl=impl), ngram_hash_ref(*inputs, **options))


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches(shape: tuple[int, int], impl: Implementation) -> None:
    tokens = torch.zeros(shape, dtype=torch.int64)
    result = ngram_hash(tokens, None, *recipe(2, 3, 4, [11]), pad_id=2, stop_at_pad=False, impl=impl)
    assert result.shape == (2, *shape, 8)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_ids_beyond_the_map(impl: Implementation) -> None:
    tokens = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    token_map, constants = torch.arange(6), recipe(1, 3, 2, [101])
    options: dict[str, Any] = dict(pad_id=2, stop_at_pad=False, token_map=token_map, impl=impl)
    with pytest.raises(IndexError, match=r"token id 9 at \[1, 1\] lies beyond the token map, whose ids are 0 to 5"):
        ngram_hash(tokens, None, *constants, **options)
    unchecked = ngram_hash(tokens, None, *constants, **options, checked=False)
    dead = ngram_hash(torch.where(tokens > 5, -1, tokens), None, *constants, **options)
    assert torch.equal(unchecked, dead)
    assert (unchecked[0, 1, [1, 3]] == -1).all()


def test_threads_change_nothing() -> None:
    tokens, documents = tokens_and_documents(5, 3001)
    inputs = tokens, documents, *recipe(2, 3, 8, [646_411, 646_421])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ngram_hash(*inputs, pad_id=2, stop_at_pad=False, impl="native"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], ngram_hash_ref(*inputs, pad_id=2, stop_at_pad=False))


def test_bad_input_is_named() -> None:
    tokens, (multipliers, primes, offsets) = torch.zeros(2, 5, dtype=torch.int64), recipe(1, 3, 2, [11])

    def call(*inputs: Tensor | None, **options: Any) -> Tensor:
        return ngram_hash(*inputs, **{"pad_id": 2, "stop_at_pad": False, **options})  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="ids must be int64, got torch.int32"):
        call(tokens.int(), None, multipliers, primes, offsets)
    with pytest.raises(TypeError, match="document_ids must be int64"):
        call(tokens, tokens.int(), multipliers, primes, offsets)
    with pytest.raises(TypeError, match="primes must be int64"):
        call(tokens, None, multipliers, primes.int(), offsets)
    with pytest.raises(ValueError, match=r"ids must be \[batch, tokens\], got \[5\]"):
        call(tokens[0], None, multipliers, primes, offsets)
    with pytest.raises(ValueError, match=r"document_ids \[2, 4\]"):
        call(tokens, tokens[:, 1:], multipliers, primes, offsets)
    with pytest.raises(ValueError, match="n-gram sizes of 2 to 8"):
        call(tokens, None, multipliers[:, :1], primes, offsets)
    with pytest.raises(ValueError, match=r"primes \[1, 1, 2\] must be \[1, 2\]"):
        call(tokens, None, multipliers, primes[:, :1], offsets)
    with pytest.raises(ValueError, match=r"offsets \[1, 3\]"):
        call(tokens, None, multipliers, primes, offsets[:, :3].contiguous())
    with pytest.raises(ValueError, match="token_map must be contiguous, one entry for each token id"):
        call(tokens, None, multipliers, primes, offsets, token_map=torch.zeros(0, dtype=torch.int64))
    for wrong in (0, -5):
        with pytest.raises(ValueError, match=f"a head has {wrong} rows: primes must be at least 2"):
            call(tokens, None, multipliers, torch.full_like(primes, wrong), offsets)
    with pytest.raises(ValueError, match="pad_id is -4"):
        call(tokens, None, multipliers, primes, offsets, pad_id=-4)
    with pytest.raises(TypeError, match="hashing needs an integer for pad_id, not 2.0"):
        call(tokens, None, multipliers, primes, offsets, pad_id=2.0)
    with pytest.raises(ValueError, match=r"primes must be contiguous, got strides \[4, 1, 2\]"):
        call(tokens, None, multipliers, torch.full((1, 2, 2), 7).transpose(1, 2), offsets)
    with pytest.raises(ValueError, match="ngram_hash has no implementation 'cuda'"):
        call(tokens, None, multipliers, primes, offsets, impl="cuda")


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_operator_registration(impl: Implementation) -> None:
    tokens, documents = tokens_and_documents(2, 5)
    constants = recipe(2, 3, 2, [11])
    arguments = (tokens, documents, *constants, torch.arange(VOCABULARY), 2, False, True, impl)
    torch.library.opcheck(torch.ops.engram.ngram_hash.default, arguments)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_compiled_graphs_hash_alike(impl: Implementation) -> None:
    tokens, documents = tokens_and_documents(2, 7)
    inputs = tokens, documents, *recipe(1, 3, 2, [11])

    def run(*tensors: Tensor) -> Tensor:
        return ngram_hash(*tensors, pad_id=2, stop_at_pad=False, impl=impl) + 1

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), run(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("stop_at_pad", [False, True])
def test_on_a_gpu(stop_at_pad: bool) -> None:
    tokens, documents = tokens_and_documents(8, 4099, 129_280)
    token_map = torch.randint(0, VOCABULARY, (129_000,))
    inputs = tokens, documents, *recipe(2, 4, 8, [2, 3, 646_411, 16_000_057, 2**31 + 11, 2**61 - 1])
    expected = ngram_hash_ref(*inputs, pad_id=2, stop_at_pad=stop_at_pad, token_map=token_map)
    on_gpu = [tensor.cuda() for tensor in inputs]
    result = ngram_hash(*on_gpu, pad_id=2, stop_at_pad=stop_at_pad, token_map=token_map.cuda(), impl="triton")
    assert torch.equal(result.cpu(), expected)
    with pytest.raises(IndexError, match="beyond the token map"):
        ngram_hash(*on_gpu, pad_id=2, stop_at_pad=stop_at_pad, token_map=token_map.cuda(), checked=True)
