"""Losses against a direct computation, and bytes against the texts that the tokens came from."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from engram.config import load_config
from engram.data.shards import Dataset
from engram.data.tokenizer import load_tokenizer
from engram.training.checkpoint import load_model
from eval import perplexity
from eval.perplexity import Perplexity, bits_per_byte, count_bytes


@torch.no_grad()
def test_against_log_softmax_row_by_row(run_folder: Path, prepared_folder: Path) -> None:
    model, dataset = load_model(run_folder).train(), Dataset(prepared_folder, "validation")
    tokenizer, length, rows = load_tokenizer(prepared_folder), 20, 7
    found = perplexity.measure_split(model, tokenizer, dataset, length, 3, rows * length + 5)
    assert model.training
    model.eval()
    texts = tokenizer.texts()
    starts = set(dataset.documents.tolist())
    losses, num_bytes = [], 0
    for row in range(rows):
        window = torch.from_numpy(dataset.window(row * length, length + 1))
        boundaries = torch.tensor([[row * length + t in starts and t > 0 for t in range(length)]])
        logits = model(window[None, :-1], boundaries.long().cumsum(1))[0]
        for t in range(length):
            if row * length + t + 1 in starts:
                continue
            target = int(window[t + 1])
            losses.append(-float(logits[t].double().log_softmax(-1)[target]))
            if target != tokenizer.eos_id:
                num_bytes += len(texts[target].encode()) if "�" not in texts[target] else 1
    assert found.targets == len(losses) and found.bytes == num_bytes
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=2e-6)


def test_agrees_with_the_trainers_validation_loss(run_folder: Path, prepared_folder: Path) -> None:
    import json

    config = load_config(run_folder / "config.yaml")
    found = perplexity.measure_split(
        load_model(run_folder),
        load_tokenizer(prepared_folder),
        Dataset(prepared_folder, "validation"),
        config.data.sequence_length,
        16,
        config.eval.tokens,
    )
    assert found.loss == pytest.approx(json.loads((run_folder / "done.json").read_text())["val_loss"], abs=2e-6)


def test_units() -> None:
    result = Perplexity(loss=2 * math.log(2), targets=30, bytes=120)
    assert result.perplexity == pytest.approx(4)
    assert result.bits_per_byte == pytest.approx(0.5) == bits_per_byte(2 * math.log(2), 30, 120)


def test_bytes_of_tokens_add_up_to_the_text(prepared_folder: Path) -> None:
    tokenizer = load_tokenizer(prepared_folder)
    counts = count_bytes(tokenizer)
    for text in ("the people of the union", "café – No. 7", "日本語 🙂\n\ttab", "  two  spaces "):
        assert counts[tokenizer.encode(text)].sum() == len(text.encode()), text
    assert counts[tokenizer.eos_id] == 0 and counts.shape == (300,)


def test_bytes_of_byte_level_tokens() -> None:
    """GPT-2's alphabet: one letter of the vocabulary's string for each byte of a broken character."""

    class ByteLevel:
        eos_id, bos_id = 3, None

        def texts(self) -> list[str]:
            return [" the", "�", "é", "<eos>", "��"]

        def raw_tokens(self) -> list[str]:
            return ["Ġthe", "Ã", "Ã©", "<eos>", "ĠðŁ"]

    np.testing.assert_array_equal(count_bytes(ByteLevel()), [4, 1, 2, 0, 3])
