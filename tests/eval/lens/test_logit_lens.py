"""The lens against plain loops in double precision, and on models whose depth is known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from engram.model.transformer import Transformer
from eval.lens import logit_lens
from eval.lens.logit_lens import METRICS, measure, places
from eval.states import batch_tokens, chunk_tokens
from tests.eval.models import MEMORY
from tests.eval.planted import documents, lively, plain, plant


def probabilities(model: Transformer, x_GD: Tensor, stream: int | None) -> list[float]:
    """softmax(head(norm(merge(x)))) of one token in double, from the equations."""
    x_GD = x_GD.double()
    if stream is not None:
        x_D = x_GD[stream]
    elif model.readout is None:
        x_D = x_GD[0]
    else:
        flat = x_GD.flatten()
        normed = flat / (flat.square().mean() + model.readout.norm_eps).sqrt()
        share_G = model.readout.scale.double() * (model.readout.weight.double() @ normed) + model.readout.bias.double()
        x_D = sum(torch.sigmoid(share_G[g]) * x_GD[g] for g in range(len(x_GD)))
    x_D = x_D / (x_D.square().mean() + model.norm.eps).sqrt() * model.norm.weight.double()
    return torch.softmax(model.head.weight.double() @ x_D, 0).tolist()


def naive(model: Transformer, document: list[int], streams: bool) -> list[list[float]]:
    """[places][metrics] summed over the document, token by token and class by class."""
    states: dict[tuple[str, int], Tensor] = {}
    handles = []
    for layer, block in enumerate(model.blocks):

        def keep(_: object, inputs: tuple[Tensor, ...], output: Tensor, layer: int = layer) -> None:
            states["resid_pre", layer], states["resid_post", layer] = inputs[0][0], output[0]

        def remember(_: object, inputs: tuple[Tensor, ...], output: Tensor, layer: int = layer) -> None:
            states["resid_memory", layer] = inputs[0][0]

        handles += [block.register_forward_hook(keep), block.attn_connection.register_forward_hook(remember)]
    with torch.no_grad():
        model(torch.tensor([document]))
    for handle in handles:
        handle.remove()
    rows = []
    for place in places(model.config, streams):
        sums = [0.0] * 6
        for t, target in enumerate(document[1:]):
            p = probabilities(model, states[place.point, place.layer][t], place.stream)
            q = probabilities(model, states["resid_post", model.config.num_layers - 1][t], None)
            best, best_q = (sorted(range(len(x)), key=lambda v, x=x: -x[v])[:5] for x in (p, q))
            found = (
                math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
                math.fsum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
                -math.fsum(a * math.log(a) for a in p),
                -math.log(p[target]),
                float(best[0] == best_q[0]),
                len(set(best) & set(best_q)) / 5,
            )
            sums = [total + value for total, value in zip(sums, found, strict=True)]
        rows.append(sums)
    return rows


@pytest.mark.parametrize(
    ("changes", "streams"),
    [({}, True), ({"hyper_connection": None}, False), ({"memory": MEMORY | {"layer_ids": [0, 2]}}, False)],
)
@torch.no_grad()
def test_every_metric_equals_the_loops(changes: dict[str, object], streams: bool) -> None:
    model, texts = lively(0.2, **changes), documents()
    found = measure(model, texts, streams=streams)
    expected = np.array([naive(model, text, streams) for text in texts])
    np.testing.assert_allclose(found.sums, expected, rtol=2e-5, atol=2e-5)
    assert found.counts.tolist() == [8, 1, 16, 4]
    # The numbers are not trivially zero.
    assert expected[:, 0, METRICS.index("kl_layer_to_final")].sum() > 5


def test_places_in_the_order_of_the_pass() -> None:
    model = lively(memory=MEMORY | {"layer_ids": [0, 2]})
    found = places(model.config)
    assert [(place.name, place.depth) for place in found] == [
        ("embedding", 0),
        ("memory 0", 0),
        ("block 0", 1),
        ("block 1", 2),
        ("memory 2", 2),
        ("block 2", 3),
    ]
    alone = places(model.config, streams=True)
    assert alone[:6] == found and [place.stream for place in alone[6:]] == [0] * 6 + [1] * 6


def test_divergence_is_not_negative_and_zero_at_the_end() -> None:
    found = measure(lively(), documents((40, 30, 20)))
    means = found.sums.sum(0) / found.counts.sum()
    both = [METRICS.index("kl_layer_to_final"), METRICS.index("kl_final_to_layer")]
    assert (found.sums[:, :, both] > -1e-6).all() and (means[:-1, both] > 0.01).all()
    assert np.abs(means[-1, both]).max() < 1e-5
    assert means[-1, METRICS.index("top1_agreement")] == means[-1, METRICS.index("top5_agreement")] == 1


def test_last_place_tells_the_models_own_loss() -> None:
    model, text = lively(), documents((30,))[0]
    found = measure(model, [text])
    with torch.no_grad():
        loss = model.loss(torch.tensor([text[:-1]]), torch.tensor([text[1:]]))
    assert found.sums[0, -1, METRICS.index("cross_entropy")] / 29 == pytest.approx(float(loss), rel=1e-5)


def test_batches_chunks_and_padding_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = lively(), documents((9, 2, 17, 5, 30))
    together = measure(model, texts)
    alone = [measure(model, [text]).sums[0] for text in texts]
    np.testing.assert_allclose(together.sums, np.stack(alone), rtol=2e-5, atol=2e-5)
    monkeypatch.setattr(logit_lens, "chunk_tokens", lambda vocab_size: 7)
    monkeypatch.setattr(logit_lens, "batch_tokens", lambda config, places: 20)
    seen: list[int] = []
    np.testing.assert_allclose(measure(model, texts, advance=seen.append).sums, together.sums, rtol=2e-5, atol=2e-5)
    assert sum(seen) == 58 and len(seen) > 2


def test_memory_and_chunks_are_bounded() -> None:
    """Logits of a chunk, and the states of a batch, for the paper's sizes."""
    assert chunk_tokens(4096) == 256 and chunk_tokens(129_280) == 128
    config = lively().config.model_copy(update={"hidden_size": 2560})
    assert batch_tokens(config, 33) * 33 * 2 * 2560 <= 2**26


def test_identity_blocks_are_read_as_the_end() -> None:
    """From the place before the first identity block on, nothing is left to predict."""
    model, texts = lively(num_layers=5), documents((30, 20))
    for layer in (3, 4):
        plant(model, layer, lambda x: x)
    found = measure(model, texts)
    kl = (found.sums.sum(0) / found.counts.sum())[found.curve][:, 0]
    assert (kl[:3] > 0.01).all() and np.abs(kl[3:]).max() < 1e-6


def test_translation_stands_before_the_norm() -> None:
    """The states of the last place in place of all others leave no divergence; a scale is not seen."""
    model, texts = plain(2), documents()
    doubled = measure(model, texts, translate=lambda place, x: 2 * x)
    np.testing.assert_allclose(doubled.sums, measure(model, texts).sums, atol=1e-3)
    negated = measure(model, texts, translate=lambda place, x: -x if place.name == "embedding" else x)
    assert (
        np.abs(negated.sums[:, 0] - doubled.sums[:, 0]).max()
        > 1
        > np.abs(negated.sums[:, 1:] - doubled.sums[:, 1:]).max()
    )
