"""`gather_rows` and `engram_lookup`: every implementation against the reference, and the reference against loops."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engram.kernels.choose import Implementation, ImplementationUnavailable
from engram.kernels.engram_lookup import (
    advise_huge_pages,
    engram_lookup,
    engram_lookup_ref,
    gather_rows,
    gather_rows_ref,
    quantize_rows,
)

ROWS = 37
FAST: tuple[Implementation, ...] = ("native", "triton")
FLOAT32, BFLOAT16, E4M3 = torch.float32, torch.bfloat16, torch.float8_e4m3fn


def table_of(dtype: torch.dtype, width: int, rows: int = ROWS) -> tuple[Tensor, Tensor | None]:
    """A table, and scales if its values are 8-bit: every byte may occur in both."""
    if dtype != E4M3:
        return torch.randn(rows, width).to(dtype), None
    values, scales = (torch.randint(0, 256, (rows, columns), dtype=torch.uint8) for columns in (width, width // 32))
    return values.view(E4M3), scales


def assert_same(actual: Tensor, expected: Tensor, impl: str, table: Tensor) -> None:
    """Bit by bit, NaN for NaN. Triton's interpreter, not its compiler, cuts float32 off where bfloat16 is stored."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    cut_off = impl == "triton" and not actual.is_cuda and expected.dtype == BFLOAT16 != table.dtype
    torch.testing.assert_close(
        actual, expected, rtol=2**-7 if cut_off else 0, atol=1e-37 if cut_off else 0, equal_nan=True
    )


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("out_dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, E4M3])
@pytest.mark.parametrize("width", [16, 32, 64, 80, 160, 256, 512])
def test_rows_equal_the_reference(width: int, dtype: torch.dtype, out_dtype: torch.dtype, impl: Implementation) -> None:
    if dtype == E4M3 and width % 32:
        width += 16
    table, scales = table_of(dtype, width)
    ids = torch.randint(-1, ROWS, (2, 5, 3))
    expected = gather_rows_ref(table, ids, scales=scales, dtype=out_dtype)
    for deduplicate in (False, True):
        options: dict[str, Any] = dict(scales=scales, dtype=out_dtype, deduplicate=deduplicate, impl=impl)
        assert_same(gather_rows(table, ids, **options), expected, impl, table)
        out = torch.full_like(expected, 7.0)
        assert gather_rows(table, ids, **options, out=out) is out
        assert_same(out, expected, impl, table)


@pytest.mark.parametrize("width", [1, 3, 5, 17, 40, 523])
@pytest.mark.parametrize("out_dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_native_takes_any_width(dtype: torch.dtype, out_dtype: torch.dtype, width: int) -> None:
    table, _ = table_of(dtype, width)
    ids = torch.randint(-1, ROWS, (4, 3))
    result = gather_rows(table, ids, dtype=out_dtype, impl="native")
    assert_same(result, gather_rows_ref(table, ids, dtype=out_dtype), "native", table)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, E4M3])
@pytest.mark.parametrize("width", [64, 96, 20])
def test_large_outputs_that_bypass_the_caches(width: int, dtype: torch.dtype) -> None:
    width += 12 if dtype == E4M3 and width == 20 else 0
    table, scales = table_of(dtype, width)
    ids = torch.randint(-1, ROWS, (9001, 25))
    for out_dtype in (FLOAT32, BFLOAT16):
        # From the middle of an allocation, too: rows may start anywhere.
        shift = torch.empty(ids.numel() * width + 1, dtype=out_dtype)[1:].view(9001, 25 * width)
        expected = gather_rows_ref(table, ids, scales=scales, dtype=out_dtype)
        for out in (None, shift):
            assert_same(
                gather_rows(table, ids, scales=scales, dtype=out_dtype, out=out, impl="native"),
                expected,
                "native",
                table,
            )


def test_the_reference_equals_loops() -> None:
    table, scales = table_of(E4M3, 64)
    assert scales is not None
    ids = torch.tensor([[3, -1], [36, 3]])
    result = gather_rows_ref(table, ids, scales=scales, dtype=FLOAT32)
    assert torch.equal(
        gather_rows_ref(table, ids, scales=scales.view(torch.float8_e8m0fnu), dtype=FLOAT32).isnan(), result.isnan()
    )
    for place, row in enumerate(ids.flatten().tolist()):
        for column in range(64):
            got = float(result.view(4, 64)[place, column])
            want = 0.0 if row < 0 else e4m3_by_hand(table, row, column) * e8m0_by_hand(int(scales[row, column // 32]))
            assert got == np.float32(want) or (np.isnan(got) and np.isnan(want)), (row, column)


def e4m3_by_hand(table: Tensor, row: int, column: int) -> float:
    byte = int(table.view(torch.uint8)[row, column])
    sign, exponent, fraction = -1.0 if byte >> 7 else 1.0, (byte >> 3) & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return float("nan")
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def e8m0_by_hand(byte: int) -> float:
    return float("nan") if byte == 255 else 2.0 ** (byte - 127)


@pytest.mark.parametrize("impl", FAST)
@given(st.data())
def test_any_ids(impl: Implementation, data: st.DataObject) -> None:
    """Duplicates, single rows, dead ids, ids beyond the table, views with gaps between rows."""
    width = data.draw(st.integers(1, 5)) * 16
    table = torch.randn(9, width + data.draw(st.sampled_from([0, 16, 3])))[:, :width]
    numbers = st.sampled_from([0, 8]) | st.integers(-3, 11) | st.sampled_from([2**31, 2**62, -(2**62)])
    shape = data.draw(st.sampled_from([(1,), (5,), (3, 4), (2, 1, 7)]))
    ids = torch.tensor([data.draw(numbers) for _ in range(int(np.prod(shape)))]).view(shape)
    expected = gather_rows_ref(table, ids, dtype=FLOAT32)
    deduplicate = data.draw(st.booleans())
    result = gather_rows(table, ids, deduplicate=deduplicate, checked=False, impl=impl)
    assert torch.equal(result, expected)
    assert (result.view(*shape, width)[(ids < 0) | (ids > 8)] == 0).all()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_rows_beyond_two_to_the_31(tmp_path: Path, dtype: torch.dtype, impl: Implementation) -> None:
    """A file with holes in it: 2^31 rows and more, of which only those that are written take up space."""
    width, rows = 16, 2**31 + 100
    size = rows * width * dtype.itemsize
    file = tmp_path / "rows"
    with file.open("wb") as handle:
        handle.truncate(size)
    table = torch.from_file(str(file), shared=True, size=rows * width, dtype=dtype).view(rows, width)
    ids = torch.tensor([[0, 2**27 + 1, 2**28 - 1], [2**31 - 1, 2**31 + 3, rows - 1]])
    written = torch.randn(6, width).to(dtype)
    table[ids.flatten()] = written
    result = gather_rows(table, ids, impl=impl)
    assert torch.equal(result.view(6, width), written)
    with pytest.raises(IndexError, match=f"row id {rows} at .1, 0. lies beyond"):
        gather_rows(table, torch.tensor([[-1], [rows]]), impl=impl)


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("deduplicate", [False, True])
def test_ids_beyond_the_table(impl: Implementation, deduplicate: bool) -> None:
    table, ids = torch.randn(5, 16), torch.tensor([[[4, -1], [5, 0]]])
    with pytest.raises(IndexError, match=r"row id 5 at \[0, 1, 0\] lies beyond the table, whose rows are 0 to 4"):
        gather_rows(table, ids, deduplicate=deduplicate, impl=impl)
    rows = gather_rows(table, ids, deduplicate=deduplicate, checked=False, impl=impl).view(4, 16)
    assert torch.equal(rows, torch.stack([table[4], torch.zeros(16), torch.zeros(16), table[0]]))


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_no_ids(impl: Implementation, shape: tuple[int, ...]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64)
    assert gather_rows(torch.randn(5, 16), ids, impl=impl).shape == (*shape[:-1], shape[-1] * 16)


def test_threads_change_nothing() -> None:
    table, _ = table_of(FLOAT32, 48)
    ids = torch.randint(-1, ROWS, (777, 3))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gather_rows(table, ids, dtype=BFLOAT16, impl="native"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_decoding_ignores_the_processors_treatment_of_subnormals() -> None:
    table, scales = (
        torch.arange(256, dtype=torch.uint8).view(8, 32).view(E4M3),
        torch.full((8, 1), 127, dtype=torch.uint8),
    )
    ids = torch.arange(8)[:, None]
    expected = table.float()
    torch.set_flush_denormal(True)
    try:
        result = gather_rows(table, ids, scales=scales, dtype=FLOAT32, impl="native")
    finally:
        torch.set_flush_denormal(False)
    assert_same(result, expected, "native", table)


def hash_recipe(longest: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    primes = torch.tensor([11, 13, 17, 19, 23, 29, 31, 37, 41][: (longest - 1) * heads]).view(longest - 1, heads)
    offsets = primes.flatten().cumsum(0) - primes.flatten()
    return torch.randint(0, 2**50, (longest,)) * 2 + 1, primes, offsets


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, E4M3])
@pytest.mark.parametrize(
    ("longest", "heads", "width", "stop_at_pad"), [(3, 2, 80, True), (4, 3, 64, False), (2, 1, 512, False)]
)
def test_lookup_equals_the_reference(
    longest: int, heads: int, width: int, stop_at_pad: bool, dtype: torch.dtype, impl: Implementation
) -> None:
    width += 16 if dtype == E4M3 and width == 80 else 0
    multipliers, primes, offsets = hash_recipe(longest, heads)
    table, scales = table_of(dtype, width, int(primes.sum()))
    tokens, token_map = torch.randint(-1, 60, (3, 13)), torch.randint(0, 40, (60,))
    documents = None if stop_at_pad else (torch.rand(3, 13) < 0.2).long().cumsum(1)
    inputs = tokens, documents, multipliers, primes, offsets, table
    options: dict[str, Any] = dict(pad_id=2, stop_at_pad=stop_at_pad, scales=scales, dtype=BFLOAT16)
    for mapping in (None, token_map):
        rows, ids = engram_lookup(*inputs, **options, token_map=mapping, impl=impl)
        expected_rows, expected_ids = engram_lookup_ref(*inputs, **options, token_map=mapping)
        assert torch.equal(ids, expected_ids)
        assert_same(rows, expected_rows, impl, table)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_lookup_of_nothing(impl: Implementation) -> None:
    tokens = torch.zeros(2, 0, dtype=torch.int64)
    rows, ids = engram_lookup(
        tokens, None, *hash_recipe(3, 2), torch.randn(80, 16), pad_id=2, stop_at_pad=False, impl=impl
    )
    assert rows.shape == (2, 0, 64)
    assert ids.shape == (2, 0, 4)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_lookup_beyond_the_map_and_beyond_the_table(impl: Implementation) -> None:
    recipe, token_map = hash_recipe(3, 2), torch.arange(6)
    rows, tokens = int(recipe[1].sum()), torch.tensor([[0, 5, -1], [3, 9, 4]])
    table = torch.randn(rows, 16)

    def look_up(tokens: Tensor, table: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = dict(pad_id=2, stop_at_pad=False, token_map=token_map, impl=impl)
        return engram_lookup(tokens, None, *recipe, table, **options | changes)

    with pytest.raises(IndexError, match=r"token id 9 at \[1, 1\] lies beyond the token map, whose ids are 0 to 5"):
        look_up(tokens, table)
    values, ids = look_up(tokens, table, checked=False)
    assert (ids[1, 1] == -1).all() and not values[1, 1].any()
    # A table that the recipe was not made for.
    tokens = tokens.clamp(max=5)
    values, ids = look_up(tokens, table)
    last = int(ids.max())
    place = ", ".join(map(str, (ids == last).nonzero()[0].tolist()))
    with pytest.raises(IndexError, match=rf"row id {last} at \[{place}\] lies beyond the table, .* 0 to {last - 1}"):
        look_up(tokens, table[:last])
    shorter, same = look_up(tokens, table[:last], checked=False)
    beyond = (ids == last)[..., None].expand(*ids.shape, 16).flatten(-2)
    assert torch.equal(same, ids) and torch.equal(shorter, values.masked_fill(beyond, 0))
    with pytest.raises(ValueError, match="pad_id is -1"):
        look_up(tokens, table, pad_id=-1)


@given(st.integers(-130, 125), st.integers(0, 2**31))
def test_quantized_rows(power: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(4, 96, generator=generator).ldexp(torch.tensor(power - 3))
    table[1, :32] = 0
    values, scales = quantize_rows(table)
    assert values.dtype == E4M3
    assert scales.dtype == torch.float8_e8m0fnu
    codes = scales.view(torch.uint8).long()
    assert codes.min() >= 1
    assert codes.max() <= 254
    decoded = gather_rows_ref(values, torch.arange(4)[:, None], scales=scales, dtype=FLOAT32)
    largest = table.unflatten(1, (3, 32)).abs().amax(-1, keepdim=True).double()
    # Half a unit in the last of three places; below the smallest normal value, half of the smallest step.
    error = (decoded - table).double().unflatten(1, (3, 32)).abs()
    scale = 2.0 ** (codes.double() - 127)[..., None]
    assert (error <= torch.maximum(table.double().unflatten(1, (3, 32)).abs() / 16, scale * 2.0**-10)).all()
    # No smaller scale would hold the block, but where the format ends.
    held = largest <= 448 * scale
    assert held.all()
    assert ((largest > 448 * scale / 2) | (codes == 1)[..., None]).all()


def test_quantizing_what_was_quantized_changes_nothing() -> None:
    values, scales = quantize_rows(torch.randn(8, 64))
    decoded = gather_rows(values, torch.arange(8)[:, None], scales=scales, dtype=FLOAT32)
    again, same = quantize_rows(decoded)
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(same.view(torch.uint8), scales.view(torch.uint8))
    with pytest.raises(ValueError, match=r"\[8, 48\] cannot be cut into blocks of 32"):
        quantize_rows(torch.randn(8, 48))


def test_bad_input_is_named() -> None:
    table, ids = torch.randn(5, 32), torch.zeros(2, 3, dtype=torch.int64)
    eight_bit, scales = quantize_rows(table)
    with pytest.raises(TypeError, match="ids must be int64 of one or more dimensions, got torch.int32"):
        gather_rows(table, ids.int())
    with pytest.raises(TypeError, match="float32, bfloat16 or float8_e4m3fn, got torch.float64"):
        gather_rows(table.double(), ids)
    with pytest.raises(TypeError, match="rows can be float32 or bfloat16, not torch.float16"):
        gather_rows(table, ids, dtype=torch.float16)
    with pytest.raises(ValueError, match="contiguous rows"):
        gather_rows(table.T, ids)
    with pytest.raises(ValueError, match="contiguous rows"):
        gather_rows(table[:0], ids)
    with pytest.raises(ValueError, match="scales belong to float8_e4m3fn tables"):
        gather_rows(eight_bit, ids)
    with pytest.raises(ValueError, match="scales belong to float8_e4m3fn tables"):
        gather_rows(table, ids, scales=scales)
    with pytest.raises(TypeError, match="scales must be float8_e8m0fnu or uint8"):
        gather_rows(eight_bit, ids, scales=scales.float())
    with pytest.raises(ValueError, match=r"one for 32 values: table \[5, 32\], scales \[5, 2\]"):
        gather_rows(eight_bit, ids, scales=torch.ones(5, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"out must be a contiguous torch.float32 \[2, 96\]"):
        gather_rows(table, ids, out=torch.empty(2, 95))
    with pytest.raises(ValueError, match="only pinned host memory may differ"):
        gather_rows(table.to("meta"), ids)
    with pytest.raises(
        ImplementationUnavailable, match="rows are 40 wide, and it takes widths that are multiples of 16 up to 512"
    ):
        gather_rows(torch.randn(5, 40), ids, impl="triton")


@pytest.mark.parametrize("impl", ["auto", "reference", *FAST])
def test_a_lookup_needs_the_offsets_of_its_heads(impl: Implementation) -> None:
    multipliers, primes, _ = hash_recipe(3, 2)
    inputs: tuple[Any, ...] = torch.zeros(2, 3, dtype=torch.int64), None, multipliers, primes, None, torch.randn(80, 16)
    with pytest.raises(TypeError, match=r"offsets are None, but one table .* first row of each, int64 \[C\]"):
        engram_lookup(*inputs, pad_id=2, stop_at_pad=False, impl=impl)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_there_is_no_gradient(impl: Implementation) -> None:
    tokens, recipe, table = torch.zeros(2, 3, dtype=torch.int64), hash_recipe(3, 2), torch.randn(80, 16)
    table.requires_grad_()
    rows, ids = engram_lookup(tokens, None, *recipe, table, pad_id=2, stop_at_pad=False, impl=impl)
    for result in (rows, gather_rows(table, ids, impl=impl)):
        with pytest.raises(RuntimeError, match=r"have no gradient: read .* through engram.memory.table.RowTable"):
            result.sum().backward()
    out = torch.empty_like(rows)
    with pytest.raises(ValueError, match="out cannot carry a gradient to the table"):
        gather_rows(table, ids, out=out, impl=impl)
    with torch.no_grad():
        assert torch.equal(gather_rows(table, ids, out=out, impl=impl), rows)


def test_advice_is_harmless() -> None:
    for tensor in (torch.randn(3), torch.zeros(3 << 20), torch.zeros(4 << 20)[1:], torch.empty(9 << 20, device="meta")):
        advise_huge_pages(tensor)
    large = torch.arange(3 << 20)
    advise_huge_pages(large)
    assert torch.equal(large, torch.arange(3 << 20))


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_operator_registration(impl: Implementation) -> None:
    table, ids = torch.randn(5, 16), torch.randint(-1, 5, (2, 3))
    torch.library.opcheck(torch.ops.engram.gather_rows.default, (table, ids, None, BFLOAT16, False, True, impl))
    out = torch.zeros(2, 48)
    torch.library.opcheck(torch.ops.engram.gather_rows_out.default, (table, ids, None, out, True, True, impl))


def test_lookup_registration() -> None:
    tokens, recipe, table = torch.randint(0, 40, (2, 3)), hash_recipe(3, 2), torch.randn(80, 16)
    arguments = (tokens, None, *recipe, None, table, None, FLOAT32, 2, False, True)
    torch.library.opcheck(torch.ops.engram.engram_lookup.default, arguments)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_compiled_graphs_read_alike(impl: Implementation) -> None:
    tokens, recipe, table = torch.randint(-1, 40, (2, 5)), hash_recipe(3, 2), torch.randn(80, 16)

    def run(tokens: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        rows, ids = engram_lookup(tokens, None, *recipe, table, pad_id=2, stop_at_pad=False, impl=impl)
        return rows + 1, gather_rows(table, ids, impl=impl) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(tokens, table)
    for actual, expected in zip(compiled, run(tokens, table), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("out_dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, E4M3])
@pytest.mark.parametrize("width", [16, 80, 256])
def test_on_a_gpu(width: int, dtype: torch.dtype, out_dtype: torch.dtype, pinned: bool) -> None:
    width += 16 if dtype == E4M3 and width % 32 else 0
    multipliers, primes, offsets = hash_recipe(4, 3)
    table, scales = table_of(dtype, width, int(primes.sum()))
    tokens, documents = torch.randint(-1, 60, (7, 1001)), (torch.rand(7, 1001) < 0.1).long().cumsum(1)
    inputs = tokens, documents, multipliers, primes, offsets
    options: dict[str, Any] = dict(pad_id=2, stop_at_pad=False, dtype=out_dtype)
    expected_rows, expected_ids = engram_lookup_ref(*inputs, table, scales=scales, **options)
    there = [None if tensor is None else tensor.pin_memory() if pinned else tensor.cuda() for tensor in (table, scales)]
    assert there[0] is not None
    on_gpu = [tensor.cuda() for tensor in inputs]
    rows, ids = engram_lookup(*on_gpu, there[0], scales=there[1], **options, impl="triton")
    assert torch.equal(engram_lookup(*on_gpu, there[0], scales=there[1], **options, checked=True)[1], ids)
    assert torch.equal(ids.cpu(), expected_ids)
    assert_same(rows.cpu(), expected_rows, "compiled", table)
    for deduplicate in (False, True):
        again = gather_rows(there[0], ids, scales=there[1], dtype=out_dtype, deduplicate=deduplicate, impl="triton")
        assert torch.equal(again.nan_to_num(), rows.nan_to_num())
