import pytest
import torch

from engram.config import UserError
from engram.model.device import choose_device


@pytest.mark.parametrize("there", [False, True])
def test_the_device_that_is_asked_for(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device("cpu", "--device").type == "cpu"
    assert choose_device("auto", "--device").type == ("cuda" if there else "cpu")
    if there:
        assert choose_device("cuda", "--device").type == "cuda"
    else:
        with pytest.raises(UserError, match="^--device is cuda, but torch sees no CUDA device: set --device to auto"):
            choose_device("cuda", "--device")
