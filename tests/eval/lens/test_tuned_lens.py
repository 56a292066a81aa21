"""The tuned lens learns a planted affine map, and leaves the model as it was."""

import pytest
import torch

from engram.model.transformer import Transformer
from eval.lens.logit_lens import METRICS, Lens, measure
from eval.lens.tuned_lens import Training, fit, translation
from tests.eval.planted import documents, plain, plant

KL = METRICS.index("kl_final_to_layer")


@pytest.fixture
def turned() -> Transformer:
    """The first block's states are the final ones, but turned and moved."""
    model = plain(2)
    turn, _ = torch.linalg.qr(torch.randn(16, 16))
    move = torch.randn(16)
    plant(model, 1, lambda x: x @ turn + move)
    return model


def mean_kl(lens: Lens, name: str) -> float:
    index = [place.name for place in lens.places].index(name)
    return float(lens.sums[:, index, KL].sum() / lens.counts.sum())


def test_recovers_a_planted_affine_map(turned: Transformer) -> None:
    maps = fit(turned, documents((200,) * 4), Training(steps=300, lr=0.05))
    held_out = documents((60, 50))
    assert set(maps) == {"embedding", "block 0"}
    untouched, tuned = measure(turned, held_out), measure(turned, held_out, translate=translation(maps))
    assert mean_kl(untouched, "block 0") > 0.5
    assert mean_kl(tuned, "block 0") < 0.02 * mean_kl(untouched, "block 0")
    # No affine map of the embedding knows what the first block adds.
    assert mean_kl(tuned, "embedding") > 10 * mean_kl(tuned, "block 0")
    assert (measure(turned, held_out, translate=translation(maps)).sums[:, -1] == untouched.sums[:, -1]).all()


def test_before_training_it_is_the_logit_lens_and_the_model_stays(turned: Transformer) -> None:
    before = {name: parameter.clone() for name, parameter in turned.named_parameters()}
    texts, steps = documents((20, 30)), []
    maps = fit(turned, texts, Training(steps=0))
    assert (measure(turned, texts, translate=translation(maps)).sums == measure(turned, texts).sums).all()
    again = [fit(turned, texts, Training(steps=3), steps.append)["embedding"].weight for _ in range(2)]
    assert torch.equal(*again) and again[0].abs().max() > 0 and len(steps) == 12
    for name, parameter in turned.named_parameters():
        assert parameter.requires_grad and parameter.grad is None and torch.equal(parameter, before[name])
