"""Plans of reads, segment sums, row updates and stochastic rounding: every implementation against the reference."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.kernels.choose import Implementation, ImplementationUnavailable
from engram.kernels.table_update import RowPlan, plan_rows, row_adam_, rowwise_adagrad_, sum_rows
from engram.kernels.table_update.native_cpu import CHUNK
from engram.kernels.table_update.rounding import random_bits, round_stochastically
from tests.tolerances import assert_close

FLOAT, BF16 = torch.float32, torch.bfloat16
ROWS = 11
ADAM = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
ADAGRAD = dict(lr=0.01, eps=1e-10, weight_decay=0.1)


def reads(count: int, rows: int = ROWS) -> Tensor:
    """Some dead, half of the others of one hot row."""
    ids = torch.randint(-1, rows, (count,))
    ids[torch.rand(count) < 0.5] = rows // 2
    return ids


def sums_by_loop(gradient: Tensor, ids: Tensor) -> dict[int, Tensor]:
    sums: dict[int, Tensor] = {}
    for row, values in zip(ids.tolist(), gradient.double(), strict=True):
        if row >= 0:
            sums[row] = sums.get(row, torch.zeros_like(values)) + values
    return dict(sorted(sums.items()))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("impl", ["reference", "native"])
@given(ids=st.lists(st.integers(-2, 9) | st.integers(-(2**63), 2**63 - 1) | st.sampled_from([7, 2**31, 2**33 + 7])))
def test_plan(impl: Implementation, ids: list[int]) -> None:
    plan = plan_rows(torch.tensor(ids, dtype=torch.int64), impl=impl)
    found = [plan.order[begin:end].tolist() for begin, end in zip(plan.starts, plan.starts[1:], strict=False)]
    rows = sorted({row for row in ids if row >= 0})
    assert plan.rows.tolist() == rows
    assert found == [[place for place, row in enumerate(ids) if row == wanted] for wanted in rows]
    assert plan.starts[0] == 0
    assert plan.starts[-1] == len(plan.order)
    assert plan.num_reads == len(ids)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_plan_of_ids_with_strides(impl: Implementation) -> None:
    ids = torch.tensor([4, 0, 2, 1, 4, 3])[::2]
    plan = plan_rows(ids, impl=impl)
    assert plan.rows.tolist() == [2, 4]
    assert plan.order.tolist() == [1, 0, 2]


@pytest.mark.parametrize("rows", [1, 300, 2**11, 2**22 + 1, 2**40])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_native_plan_of_many_reads(rows: int, threads: int) -> None:
    ids = torch.randint(-1, rows, (4099,)).view(1, 4099)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native = plan_rows(ids, impl="native")
    finally:
        torch.set_num_threads(before)
    for ours, expected in zip(native[:3], plan_rows(ids, impl="reference")[:3], strict=True):
        assert torch.equal(ours, expected)


# ---------------------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize(
    ("impl", "count", "width"),
    [
        *(("reference", count, 5) for count in (1, 63)),
        *(("native", count, width) for count in (1, 63, 3 * CHUNK + 5) for width in (5, 64)),
        *(("triton", count, width) for count, width in ((1, 16), (63, 16), (200, 80))),
    ],
)
def test_sums(impl: Implementation, count: int, width: int, dtype: torch.dtype) -> None:
    ids, gradient = reads(count), torch.randn(count, width).to(dtype)
    expected = sums_by_loop(gradient, ids)
    plan = plan_rows(ids)
    sums = sum_rows(gradient, plan, impl=impl)
    assert sums.dtype == FLOAT
    assert plan.rows.tolist() == list(expected)
    if expected:
        assert_close(sums, torch.stack(list(expected.values())), "table_update", name="sums")
    assert torch.equal(sums, sum_rows(gradient, plan, impl=impl))


@settings(max_examples=40)
@given(
    runs=st.lists(st.integers(1, 40) | st.integers(CHUNK - 2, 2 * CHUNK + 2), min_size=1, max_size=6),
    dead=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_runs_of_any_length_and_place(runs: list[int], dead: int, seed: int) -> None:
    """Hot rows are cut at multiples of a chunk, wherever their reads begin."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.full((length,), 3 * row) for row, length in enumerate(runs)] + [torch.full((dead,), -1)])
    ids = ids[torch.randperm(len(ids), generator=generator)]
    # Small whole numbers add up exactly in any order.
    gradient = torch.randint(-8, 9, (len(ids), 3), generator=generator).float()
    sums = sum_rows(gradient, plan_rows(ids, impl="native"), impl="native")
    assert torch.equal(sums.double(), torch.stack(list(sums_by_loop(gradient, ids).values())))


@pytest.mark.parametrize("runs", [[31, 1, 32], [32, 32], [64, 63, 1], [5, 130, 2]])
def test_triton_runs_across_chunks(runs: list[int]) -> None:
    ids = torch.cat([torch.full((length,), 3 * row) for row, length in enumerate(runs)])[torch.randperm(sum(runs))]
    gradient = torch.randint(-8, 9, (len(ids), 16)).float()
    sums = sum_rows(gradient, plan_rows(ids), impl="triton")
    assert torch.equal(sums.double(), torch.stack(list(sums_by_loop(gradient, ids).values())))


# ------------------------------------------------------------------------------------------------------------- updates


def adam_by_loop(table: Tensor, sums: list[dict[int, Tensor]]) -> tuple[Tensor, ...]:
    weight = table.double()
    mean, square, steps = torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros(len(table))
    for of_step in sums:
        for row, gradient in of_step.items():
            steps[row] += 1
            mean[row] = 0.9 * mean[row] + 0.1 * gradient
            square[row] = 0.95 * square[row] + 0.05 * gradient**2
            root = (square[row] / (1 - 0.95 ** steps[row].item())).sqrt() + 1e-10
            weight[row] = weight[row] * (1 - 0.001) - 0.01 * mean[row] / (1 - 0.9 ** steps[row].item()) / root
    return weight, mean, square, steps


def adam_state(table: Tensor) -> list[Tensor]:
    zeros = [torch.zeros(table.shape, device=table.device) for _ in range(2)]
    return [*zeros, torch.zeros(len(table), dtype=torch.int32, device=table.device)]


UPDATES = [("reference", 5), ("native", 5), ("native", 80), ("triton", 16), ("triton", 80)]


@pytest.mark.parametrize(("impl", "width"), UPDATES)
def test_row_adam(impl: Implementation, width: int) -> None:
    table = torch.randn(ROWS, width)
    all_ids = [reads(50), torch.tensor([3, 3]), torch.tensor([9])]
    gradients = [torch.randn(len(ids), width) for ids in all_ids]
    expected = adam_by_loop(table, [sums_by_loop(*pair) for pair in zip(gradients, all_ids, strict=True)])
    state = adam_state(table)
    for ids, gradient in zip(all_ids, gradients, strict=True):
        row_adam_(table, *state, gradient, plan_rows(ids), **ADAM, impl=impl)
    for name, ours, theirs in zip(("table", "first", "second", "row_step"), (table, *state), expected, strict=True):
        assert_close(ours, theirs, "table_update", name=name)


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_row_adam_of_late_steps(impl: Implementation) -> None:
    """Corrections far out, where 0.999^t still counts, and behind the end of every list."""
    steps = torch.tensor([0, 1, 2, 99, 1000, 17_000, 65_534, 65_535, 70_000, 2**30], dtype=torch.int32)
    outcomes = []
    gradient = torch.randn(len(steps), 16)
    for betas in ((0.9, 0.999), (0.99999, 0.9999999), (0.0, 0.5)):
        for each in (impl, "reference"):
            table, *state = (torch.full(gradient.shape, value) for value in (0.0, 0.1, 0.2))
            plan = plan_rows(torch.arange(len(steps)))
            row_adam_(table, *state, steps.clone(), gradient, plan, **(ADAM | {"betas": betas}), impl=each)
            outcomes.append(table)
        assert_close(*outcomes[-2:], "table_update", name=f"update with {betas}")


@pytest.mark.parametrize(("impl", "width"), UPDATES)
def test_rowwise_adagrad(impl: Implementation, width: int) -> None:
    table = torch.randn(ROWS, width)
    square_sum, weight, sums = torch.zeros(ROWS), table.double(), torch.zeros(ROWS, dtype=torch.float64)
    for ids in (reads(50), torch.tensor([3, 3])):
        gradient = torch.randn(len(ids), width)
        rowwise_adagrad_(table, square_sum, gradient, plan_rows(ids), **ADAGRAD, impl=impl)
        for row, values in sums_by_loop(gradient, ids).items():
            sums[row] += values.square().mean()
            weight[row] = weight[row] * (1 - 0.001) - 0.01 * values / (sums[row].sqrt() + 1e-10)
    assert_close(table, weight, "table_update", name="table")
    assert_close(square_sum, sums, "table_update", name="square_sum")


@pytest.mark.parametrize("gradient_dtype", [FLOAT, BF16])
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_bfloat16_tables_equal_the_reference(impl: Implementation, gradient_dtype: torch.dtype) -> None:
    """To the bit, where the float32 results before rounding are: gradients that add up exactly, and Adagrad's."""
    start = torch.randn(ROWS, 48).bfloat16()
    ids = reads(60)
    gradient = (torch.randint(-8, 9, (60, 48)) / 8).to(gradient_dtype)
    tables: dict[str, list[Tensor]] = {}
    for each in (impl, "reference"):
        adam, adagrad = start.clone(), start.clone()
        row_adam_(adam, *adam_state(start), gradient, plan_rows(ids), **ADAM, seed=2**32 - 1, impl=each)
        rowwise_adagrad_(adagrad, torch.zeros(ROWS), gradient, plan_rows(ids), **ADAGRAD, seed=3, impl=each)
        tables[each] = [adam, adagrad]
    for name, ours, theirs in zip(("adam", "adagrad"), tables[impl], tables["reference"], strict=True):
        assert_close(ours, theirs, "table_update", name=name, dtype=BF16)
        assert (ours != theirs).float().mean() < 0.01, name
    untouched = [row for row in range(ROWS) if row not in ids.tolist()]
    assert torch.equal(tables[impl][0][untouched], start[untouched])


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_summed_before_or_within_the_update_gives_the_same_bits(impl: Implementation) -> None:
    start, ids, gradient = torch.randn(ROWS, 16), reads(150), torch.randn(150, 16)
    plan = plan_rows(ids)
    counting = torch.arange(len(plan.rows) + 1)
    alone = RowPlan(plan.rows, counting, counting[:-1], len(plan.rows))
    tables = []
    for each, values in ((plan, gradient), (alone, sum_rows(gradient, plan, impl=impl))):
        table = start.clone()
        row_adam_(table, *adam_state(table), values, each, **ADAM, impl=impl)
        tables.append(table)
    assert torch.equal(*tables)


def test_native_bits_do_not_depend_on_threads(two_threads: None) -> None:
    ids, gradient, start = reads(20_000, 700), torch.randn(20_000, 24), torch.randn(700, 24).bfloat16()
    outcomes = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        table, state = start.clone(), adam_state(start)
        row_adam_(table, *state, gradient, plan_rows(ids, impl="native"), **ADAM, seed=1, impl="native")
        outcomes.append([table, *state])
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_rows_beyond_2_to_the_31_elements(impl: Implementation) -> None:
    """Of a table that only the touched pages of are ever mapped."""
    width = 512
    rows = torch.tensor([1, 2**22 - 3, 2**22 + 1])
    table = torch.empty((2**22 + 2) * width, dtype=BF16, device="meta")
    storage = torch.UntypedStorage(table.nbytes)
    table = torch.tensor([], dtype=BF16).set_(storage, 0, (2**22 + 2, width), (width, 1))  # type: ignore[call-overload]
    table[rows] = 1.0
    square_sum, gradient = torch.zeros(len(table)), torch.ones(3, width)
    rowwise_adagrad_(table, square_sum, gradient, plan_rows(rows), lr=0.5, eps=0.0, impl=impl)
    assert square_sum.nonzero()[:, 0].tolist() == rows.tolist()
    assert torch.equal(table[rows], torch.full((3, width), 0.5, dtype=BF16))


@pytest.mark.parametrize("impl", ["auto", "reference", "native", "triton"])
def test_no_reads_and_dead_reads_change_nothing(impl: Implementation) -> None:
    for ids in (torch.empty(0, dtype=torch.int64), torch.tensor([-1, -1])):
        table, gradient, square_sum = torch.ones(3, 16), torch.ones(len(ids), 16), torch.zeros(3)
        state, plan = adam_state(table), plan_rows(ids)
        assert sum_rows(gradient, plan, impl=impl).shape == (0, 16)
        row_adam_(table, *state, gradient, plan, **ADAM, impl=impl)
        rowwise_adagrad_(table, square_sum, gradient, plan, **ADAGRAD, impl=impl)
        assert torch.equal(table, torch.ones(3, 16))
        assert not any(each.any() for each in (*state, square_sum))


# ------------------------------------------------------------------------------------------------------------ rounding


def mix_by_integers(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_hash_equals_integer_arithmetic() -> None:
    rows = [0, 1, 2**31, 2**40 + 5]
    for seed in (0, 1, 2**32 - 1):
        bits = random_bits(seed, torch.tensor(rows), 70)
        for row, line in zip(rows, bits.tolist(), strict=True):
            key = mix_by_integers(mix_by_integers(mix_by_integers(seed) ^ row % 2**32) ^ row >> 32)
            assert line == [mix_by_integers((key + column * 0x9E3779B9) % 2**32) >> 16 for column in range(70)]


def test_random_bits_are_uniform_over_seeds_rows_and_columns() -> None:
    for bits in (
        random_bits(3, torch.arange(4096), 16),
        random_bits(3, torch.arange(16), 4096),
        torch.cat([random_bits(seed, torch.tensor([5]), 64) for seed in range(1024)]),
    ):
        counts = (bits >> 12).flatten().bincount(minlength=16).double() / bits.numel()
        # Five standard deviations of a sixteenth of 2^16 numbers.
        assert (counts * 16 - 1).abs().max() < 5 * (15 / bits.numel()) ** 0.5
        columns, rows = bits.double().mean(0), bits.double().mean(1)
        assert columns.std() < 1.3 * 2**16 / 12**0.5 / bits.shape[0] ** 0.5
        assert rows.std() < 1.3 * 2**16 / 12**0.5 / bits.shape[1] ** 0.5


def test_rounding_keeps_the_mean_and_what_bfloat16_holds() -> None:
    value = 1 + 2**-7 * 0.3
    rounded = round_stochastically(torch.full((512, 64), value), 9, torch.arange(512))
    assert rounded.unique().tolist() == [1.0, 1 + 2**-7]
    # Five standard deviations of 2^15 coins.
    assert abs(float((rounded > 1).float().mean()) - 0.3) < 5 * (0.21 / 2**15) ** 0.5
    exact = torch.tensor([[0.0, -0.0, 1.5, -3e38, 2**-133, torch.inf, -torch.inf, torch.nan]])
    kept = round_stochastically(exact.bfloat16().float(), 9, torch.arange(1))
    assert torch.equal(kept[:, :-1].view(torch.int16), exact[:, :-1].bfloat16().view(torch.int16))
    assert kept[0, -1].isnan()


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_rounding_is_the_same_to_the_bit(impl: Implementation) -> None:
    """w - lr g / (sqrt(mean g^2) + eps) with g of one magnitude: exact before it is rounded."""
    rows = torch.arange(40) * 1001
    table, signs = torch.randn(40 * 1001, 16).bfloat16(), torch.randn(40, 16).sign()
    table[rows[0], :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    expected = round_stochastically(table[rows].float() - 2**-12 * signs, 77, rows)
    rowwise_adagrad_(table, torch.zeros(len(table)), signs, plan_rows(rows), lr=2**-12, eps=0.0, seed=77, impl=impl)
    assert torch.equal(table[rows].view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_a_part_of_a_table_rounds_by_numbers_in_the_whole(impl: Implementation) -> None:
    """Rows 17 to 40 of a table, held by themselves and in another order, with numbers from beyond 2^32 on."""
    first, rows = 2**33 + 5, torch.arange(17, 40)
    start, gradient = torch.randn(23, 16).bfloat16(), torch.randint(-8, 9, (23, 16)) / 8
    outcomes: dict[str, list[Tensor]] = {}
    for name, order in (("in order", torch.arange(23)), ("held otherwise", torch.randperm(23))):
        adam, adagrad = start[order], start[order]
        settings: dict[str, Any] = dict(seed=5, row_ids=first + rows[order], impl=impl)
        plan = RowPlan.of_sums(torch.arange(23))
        row_adam_(adam, *adam_state(adam), gradient[order], plan, **ADAM, **settings)
        rowwise_adagrad_(adagrad, torch.zeros(23), gradient[order], plan, **ADAGRAD, **settings)
        outcomes[name] = [each[order.argsort()] for each in (adam, adagrad)]
    local = start.clone()
    row_adam_(local, *adam_state(local), gradient, plan, **ADAM, seed=5, impl=impl)
    for ordered, otherwise in zip(*outcomes.values(), strict=True):
        assert torch.equal(ordered, otherwise)
    assert not torch.equal(local, outcomes["in order"][0])


# ----------------------------------------------------------------------------------------------- dispatcher, bad input


def test_operators_are_what_they_declare() -> None:
    ids, gradient = reads(30), torch.randn(30, 16)
    plan, table = plan_rows(ids), torch.randn(ROWS, 16)
    for impl in ("native", "reference"):
        torch.library.opcheck(torch.ops.engram.plan_rows.default, (ids, impl))
        torch.library.opcheck(torch.ops.engram.sum_rows.default, (gradient, *plan, impl))
        adam = (table, *adam_state(table), gradient, *plan, 0.1, 0.9, 0.95, 1e-8, 0.1, 0, impl)
        torch.library.opcheck(torch.ops.engram.row_adam_.default, adam)
        adagrad = (table, torch.zeros(ROWS), gradient, *plan, 0.1, 1e-8, 0.1, 0, impl)
        torch.library.opcheck(torch.ops.engram.rowwise_adagrad_.default, adagrad)


def test_compiles_without_graph_breaks() -> None:
    ids, gradient = reads(30), torch.randn(30, 16)

    def update(table: Tensor, square_sum: Tensor, gradient: Tensor, ids: Tensor) -> None:
        rowwise_adagrad_(table, square_sum, gradient, plan_rows(ids), **ADAGRAD)

    outcomes = []
    for run in (update, torch.compile(update, fullgraph=True, backend="aot_eager")):
        table, square_sum = torch.ones(ROWS, 16), torch.zeros(ROWS)
        run(table, square_sum, gradient, ids)
        outcomes.append((table, square_sum))
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


def adam_with(**changes: Any) -> Callable[[], None]:
    table = changes.pop("table", torch.zeros(4, 16))
    state = dict(zip(("first", "second", "row_step"), adam_state(torch.zeros(4, 16)), strict=True))
    tensors = dict(table=table, **state, gradient=torch.zeros(2, 16), plan=plan_rows(torch.tensor([1, 3]))) | changes
    return lambda: row_adam_(**(ADAM | tensors))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"table": torch.zeros(4, 16).double()}, TypeError, "table is torch.float64, but must be float32 or bfloat16"),
        ({"gradient": torch.zeros(2, 16).half()}, TypeError, "gradient is torch.float16"),
        ({"first": torch.zeros(4, 16).bfloat16()}, TypeError, "first is torch.bfloat16, but must be torch.float32"),
        ({"row_step": torch.zeros(4)}, TypeError, "row_step is torch.float32, but must be torch.int32"),
        ({"second": torch.zeros(5, 16)}, ValueError, r"second must be a contiguous tensor \[4, 16\], not \[5, 16\]"),
        ({"table": torch.zeros(16, 4).T}, ValueError, "table must be a contiguous matrix"),
        ({"gradient": torch.zeros(2, 1).expand(2, 16)}, ValueError, "gradient must be a contiguous matrix"),
        ({"gradient": torch.zeros(2, 8)}, ValueError, "table are 16 wide, those of the gradient 8"),
        ({"gradient": torch.zeros(3, 16)}, ValueError, "gradient has 3 rows, but the plan was made of 2 ids"),
        ({"plan": plan_rows(torch.tensor([1, 4]))}, IndexError, "plan holds row 4, but the table has only 4 rows"),
        ({"seed": 2**32}, ValueError, "seed is 4294967296, but must be at least 0 and below"),
        ({"seed": 0.5}, TypeError, "a table update needs an integer for seed, not 0.5"),
        ({"second": torch.zeros(4, 16, device="meta")}, ValueError, "lie on several devices: .*meta"),
        ({"impl": "cuda"}, ValueError, "row_adam_ has no implementation 'cuda'"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adam_with(**changes)()


@pytest.mark.parametrize(
    ("rows", "starts", "order"),
    [
        ([3, 1], [0, 1, 2], [0, 1]),
        ([1, 1], [0, 1, 2], [0, 1]),
        ([-1, 3], [0, 1, 2], [0, 1]),
        ([1, 3], [0, 1, 9], [0, 1]),
        ([1, 3], [0, 2, 1], [0, 1]),
        ([1, 3], [0, 1], [0, 1]),
        ([1, 3], [0, 1, 2], [0, 9]),
        ([1, 3], [0, 1, 2], [-1, 0]),
    ],
)
def test_a_plan_that_nobody_planned_is_refused(rows: list[int], starts: list[int], order: list[int]) -> None:
    plan = RowPlan(torch.tensor(rows), torch.tensor(starts), torch.tensor(order), 2)
    with pytest.raises(ValueError, match="use plan_rows"):
        adam_with(plan=plan)()
    with pytest.raises(ValueError, match="use plan_rows"):
        sum_rows(torch.zeros(2, 16), plan)


def test_what_an_implementation_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_rows(torch.tensor([0, 1]))
    with pytest.raises(
        ImplementationUnavailable, match="but rows are 20 wide, and it takes .* multiples of 16 up to 1024"
    ):
        sum_rows(torch.zeros(2, 20), plan, impl="triton")
    with pytest.raises(TypeError, match=r"int64 ids, not torch.int32"):
        plan_rows(torch.zeros(2, dtype=torch.int32))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ImplementationUnavailable, match="tensors are on cpu"):
        sum_rows(torch.zeros(2, 16), plan, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("width", [16, 80, 256, 512])
def test_cuda_equals_the_reference(width: int, dtype: torch.dtype) -> None:
    ids, start = reads(5000, 1009).cuda(), torch.randn(1009, width).to(dtype).cuda()
    gradient = (torch.randint(-8, 9, (5000, width)) / 8).to(dtype).cuda()
    plan, outcomes = plan_rows(ids), []
    for impl in ("auto", "auto", "reference"):
        table, state = start.clone(), adam_state(start)
        adagrad, square_sum = start.clone(), torch.zeros(1009, device="cuda")
        row_adam_(table, *state, gradient, plan, **ADAM, seed=2**32 - 1, impl=impl)
        rowwise_adagrad_(adagrad, square_sum, gradient, plan, **ADAGRAD, seed=3, impl=impl)
        outcomes.append([table, *state, adagrad, square_sum, sum_rows(gradient, plan, impl=impl)])
    assert all(torch.equal(*pair) for pair in zip(*outcomes[:2], strict=True))
    for index, (ours, theirs) in enumerate(zip(*outcomes[1:], strict=True)):
        assert_close(
            ours, theirs, "table_update", name=str(index), dtype=ours.dtype if ours.is_floating_point() else FLOAT
        )
