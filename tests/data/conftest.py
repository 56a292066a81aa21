"""Small tokenizers and prepared folders, made without any network."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from engram.config import Config, parse_config
from engram.data.documents import text_digest
from engram.data.manifest import Manifest, TokenizerRecord
from engram.data.shards import ShardWriter, record_files, token_dtype
from engram.data.tokenizer import SentencePieceTokenizer
from engram.data.tokenizer_training import train_tokenizer

WORDS = ("union", "state", "congress", "people", "nation", "peace", "treaty", "commerce", "law", "war", "army", "year")


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different texts of some known words, of 5 to 40 words each."""
    chance = random.Random(seed)
    return [f"{number}. " + " ".join(chance.choices(WORDS, k=chance.randint(5, 40))) + ".\n" for number in range(count)]


@pytest.fixture(scope="session")
def tokenizer() -> SentencePieceTokenizer:
    return train_tokenizer(sentences(200), vocab_size=320, character_coverage=0.9999)


FolderMaker = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> FolderMaker:
    """Writes a prepared folder that holds exactly the given documents (lists of ids, without their end)."""

    def make(
        train: Sequence[Sequence[int]], validation: Sequence[Sequence[int]] = ((5,),), shard_tokens: int = 1024
    ) -> Path:
        folder = tmp_path / "prepared"
        folder.mkdir()
        file = tokenizer.save(folder)
        splits = {}
        for split, documents in (("train", train), ("validation", validation)):
            writer = ShardWriter(folder, split, token_dtype(320), tokenizer.eos_id, shard_tokens)
            for document in documents:
                writer.add(document, text_digest(str(document)))
            splits[split] = writer.close()
        record = TokenizerRecord(file=file.name, digest=tokenizer.digest, vocab_size=320, eos_id=2, bos_id=1)
        manifest = Manifest(
            settings={},
            tokenizer=record,
            dtype="uint16",
            split_seed=0,
            validation_fraction=0.1,
            sources=[],
            splits=splits,
            files=record_files(folder),
        )
        manifest.save(folder)
        return folder

    return make


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """A config whose data section is `path: tmp_path/prepared` and what is given."""

    def make(vocab_size: int = 320, **data: Any) -> Config:
        attention = {
            "num_heads": 2,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        }
        model = {"num_layers": 1, "hidden_size": 16, "vocab_size": vocab_size, "attention": attention}
        section = {"path": str(tmp_path / "prepared"), "sequence_length": 16, "cache": str(tmp_path / "cache")} | data
        return parse_config({"model": model, "data": section, "train": {"steps": 1, "batch_size": 4}})

    return make
