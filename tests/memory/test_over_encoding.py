"""OverEncoding, the baseline that averages n-gram rows into the input embedding, against the loops."""

from typing import Any

import pytest
import torch

from engram.config import OverEncodingConfig
from engram.memory.over_encoding import OverEncoding
from engram.memory.vocabulary import VocabularyMap
from tests.reference import engram_loops as loops
from tests.tolerances import assert_close

WIDTH, VOCABULARY = 7, 17


def build(**changes: Any) -> tuple[OverEncoding, OverEncodingConfig]:
    config = OverEncodingConfig(**{"num_heads": 2, "head_dim": 3, "rows_per_head": (11, 5), **changes})
    module = OverEncoding(config, hidden_size=WIDTH, vocabulary=VocabularyMap.identity(VOCABULARY))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module, config


def run_loops(
    config: OverEncodingConfig,
    embedded: torch.Tensor,
    tokens: list[list[int]],
    documents: list[list[int]] | None,
    table: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    orders = len(config.rows_per_head)
    primes = loops.distinct_primes(1, config.num_heads, config.rows_per_head)[0]
    multipliers = loops.pcg64_multipliers(0, orders + 1, VOCABULARY, config.seed)
    output = []
    for index, row in enumerate(tokens):
        own = None if documents is None else documents[index]
        hashed = loops.hash_ids(row, multipliers, primes, config.pad_id, config.look_back, own)
        ids = loops.add_offsets(hashed, primes)
        output.append([loops.over_encoding(embedded[index, t], ids[t], table, weight, orders) for t in range(len(row))])
    return torch.stack([torch.stack(row) for row in output])


@pytest.mark.parametrize("changes", [{}, {"max_ngram_size": 4, "rows_per_head": (5, 7, 11), "num_heads": 1, "seed": 9}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients(changes: dict[str, Any], dtype: torch.dtype) -> None:
    module, config = build(**changes)
    tokens = torch.randint(0, VOCABULARY, (2, 9))
    tokens[0, 4] = -1
    documents = torch.tensor([[0] * 9, [0, 0, 0, 1, 1, 2, 2, 2, 2]])
    embedded = torch.randn(2, 9, WIDTH).to(dtype).requires_grad_()
    output = module(embedded, tokens, documents)
    assert output.dtype == dtype
    leaves = {name: parameter.detach().double().requires_grad_() for name, parameter in module.named_parameters()}
    assert leaves.keys() == {"embed.weight", "proj.weight"}
    exact = embedded.detach().double().requires_grad_()
    expected = run_loops(
        config, exact, tokens.tolist(), documents.tolist(), leaves["embed.weight"], leaves["proj.weight"]
    )
    assert_close(output, expected, "over_encoding", dtype=dtype)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    expected.backward(cotangent.double())
    assert_close(embedded.grad, exact.grad, "over_encoding", name="gradient of the embedding", dtype=dtype)
    for name, leaf in leaves.items():
        gradient = module.get_parameter(name).grad
        assert gradient.dtype == torch.float32
        assert_close(gradient, leaf.grad, "engram_grad", name=f"gradient of {name}", dtype=dtype)
    assert module.embed.weight.grad.is_sparse


def test_it_is_a_mean_of_the_token_and_each_order() -> None:
    module, _ = build()
    with torch.no_grad():
        module.embed.weight.fill_(1.0)
        module.proj.weight.zero_()
        # Bigram columns come first: the bigram vector is 6 * 1, the trigram vector 6 * 10.
        module.proj.weight[:, :6] = 1.0
        module.proj.weight[:, 6:] = 10.0
    output = module(torch.full((1, 4, WIDTH), 3.0), torch.tensor([[1, 2, 3, -1]]))
    assert_close(output[0, :3], torch.full((3, WIDTH), (3 + 6 + 60) / 3), "over_encoding")
    # A dead token reads no rows; its own embedding keeps its share.
    assert_close(output[0, 3], torch.full((WIDTH,), 1.0), "over_encoding")


def test_documents_do_not_see_each_other() -> None:
    module, _ = build()
    first, second = torch.randint(0, VOCABULARY, (1, 4)), torch.randint(0, VOCABULARY, (1, 5))
    embedded = torch.randn(1, 9, WIDTH)
    packed = module(embedded, torch.cat([first, second], dim=1), torch.tensor([[0] * 4 + [1] * 5]))
    alone = torch.cat([module(embedded[:, :4], first), module(embedded[:, 4:], second)], dim=1)
    assert_close(packed, alone.double(), "over_encoding")
    assert (module(embedded, torch.cat([first, second], dim=1))[0, 4] != packed[0, 4]).any()


def test_nothing_later_is_read() -> None:
    module, _ = build(rows_per_head=(10_007, 20_011))
    tokens, embedded = torch.randint(0, VOCABULARY, (1, 8)), torch.randn(1, 8, WIDTH)
    before = module(embedded, tokens)
    changed = tokens.clone()
    changed[0, 4] = (tokens[0, 4] + 1) % VOCABULARY
    differ = (module(embedded, changed) != before).any(-1)[0].tolist()
    assert differ == [False] * 4 + [True] * 3 + [False]
