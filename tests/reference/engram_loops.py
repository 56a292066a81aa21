"""The Engram module once more, as loops over tokens, orders, heads, streams and taps; imports nothing of ours.

Integers are Python integers, which cannot overflow. Real-valued functions take numpy arrays or torch tensors, float64,
and touch one token and one stream at a time; given tensors, autograd supplies the reference gradients.
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# The White_Space characters of Unicode; `str.strip()` would also take U+001C to U+001F.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
WHITE_SPACE += "\u2028\u2029\u202f\u205f\u3000"
SENTINEL = "\ue000"

# A vector: numpy array or torch tensor of one dimension.
Vector = Any

# ---------------------------------------------------------------------------------------------------------- vocabulary


def normalise(text: str) -> str:
    """NFKC, NFD, drop marks, lower-case each character, squeeze blanks, strip; a lone blank survives."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(character for character in text if unicodedata.category(character)[0] != "M")
    text = "".join(character.lower() for character in text)
    text = re.sub("[ \t\r\n]+", " ", text)
    if text == " ":
        text = SENTINEL
    return text.strip(WHITE_SPACE).replace(SENTINEL, " ")


def vocabulary_key(text: str, raw_token: str) -> str:
    return raw_token if "\ufffd" in text else normalise(text) or text


def vocabulary_map(texts: Sequence[str], raw_tokens: Sequence[str]) -> tuple[list[int], int]:
    """Class of each token, numbered in the order in which classes are first seen; and the number of classes."""
    classes: dict[str, int] = {}
    table = []
    for text, raw_token in zip(texts, raw_tokens, strict=True):
        key = vocabulary_key(text, raw_token)
        if key not in classes:
            classes[key] = len(classes)
        table.append(classes[key])
    return table, len(classes)


# ------------------------------------------------------------------------------------------------------------- hashing


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def distinct_primes(num_layers: int, num_heads: int, rows_per_head: Sequence[int]) -> list[list[list[int]]]:
    """`[layer][order][head]`: the smallest prime not below the order's rows that nobody took before."""
    taken: set[int] = set()
    layers = []
    for _ in range(num_layers):
        orders = []
        for rows in rows_per_head:
            heads: list[int] = []
            for _ in range(num_heads):
                prime = rows
                while prime in taken or not is_prime(prime):
                    prime += 1
                taken.add(prime)
                heads.append(prime)
            orders.append(heads)
        layers.append(orders)
    return layers


def pcg64_multipliers(layer_id: int, max_ngram_size: int, vocabulary_size: int, seed: int = 0) -> list[int]:
    """DeepSeek's: odd, and so small that no product with a token id leaves int64."""
    bound = (2**63 - 1) // vocabulary_size // 2
    draws = np.random.default_rng(seed + 10007 * layer_id).integers(0, bound, size=max_ngram_size, dtype=np.int64)
    return [2 * int(draw) + 1 for draw in draws]


def splitmix64(state: int) -> int:
    """One step of SplitMix64 (Steele et al. 2014)."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def splitmix64_multipliers(ordinal: int, max_ngram_size: int, vocabulary_size: int, seed: int = 0) -> list[int]:
    """Qwen3.8's; `ordinal` counts the memory layers, whatever their place in the backbone."""
    bound = (2**63 - 1) // vocabulary_size // 2
    start = seed + 10007 * ordinal
    return [2 * (splitmix64(start + 0x9E3779B97F4A7C15 * (i + 1)) % bound) + 1 for i in range(max_ngram_size)]


def look_back(
    ids: Sequence[int], position: int, size: int, pad: int, rule: str, documents: Sequence[int] | None = None
) -> list[int]:
    """The n-gram that ends at `position`, newest first; nothing but pads from the first place it may not enter."""
    gram = [ids[position]]
    stopped = False
    for source in range(position - 1, position - size, -1):
        outside = source < 0 or ids[source] < 0
        foreign = rule == "segment" and documents is not None and documents[source] != documents[position]
        ended = rule == "eos" and ids[source] == pad
        stopped = stopped or outside or foreign or ended
        gram.append(pad if stopped else ids[source])
    return gram


def hash_ids(
    ids: Sequence[int],
    multipliers: Sequence[int],
    primes: Sequence[Sequence[int]],
    pad: int,
    rule: str = "segment",
    documents: Sequence[int] | None = None,
) -> list[list[int]]:
    """`[position][order, head]` without offsets; -1 throughout where the token itself is dead (negative)."""
    result = []
    for position in range(len(ids)):
        heads = []
        for order, sizes in enumerate(primes, start=2):
            mixed = 0
            gram = look_back(ids, position, order, pad, rule, documents)
            for token, multiplier in zip(gram, multipliers[:order], strict=True):
                mixed ^= token * multiplier
            heads += [-1 if ids[position] < 0 else mixed % size for size in sizes]
        result.append(heads)
    return result


def add_offsets(hashed: Sequence[Sequence[int]], primes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of the one table that holds all heads, each after the ones before it."""
    sizes = [size for heads in primes for size in heads]
    return [
        [identifier if identifier < 0 else identifier + sum(sizes[:head]) for head, identifier in enumerate(token)]
        for token in hashed
    ]


# --------------------------------------------------------------------------------------------------------- real numbers


def rms_norm(vector: Vector, gain: Vector, eps: float) -> Vector:
    return vector / ((vector * vector).sum() / len(vector) + eps) ** 0.5 * gain


def sigmoid(number: Any) -> Any:
    return 1 / (1 + math.e**-number)


def gate_value(hidden: Vector, key: Vector, q: Vector, k: Vector, eps: float, kind: str | None) -> Any:
    """How much of the value one stream takes in: 1 without a gate."""
    if kind is None:
        return 1.0
    score = (rms_norm(hidden, q, eps) * rms_norm(key, k, eps)).sum() / len(hidden) ** 0.5
    if kind == "plain":
        return sigmoid(score)
    magnitude = abs(score) if abs(score) > 1e-6 else 1e-6
    return sigmoid((-1 if score < 0 else 1) * magnitude**0.5)


def project(weight: Any, bias: Any, table: Any, ids: Sequence[int]) -> Vector:
    """`weight @ concatenated rows + bias`, row by row; id -1 stands for a row of zeros."""
    width = table.shape[1]
    total = weight[:, 0] * 0 if bias is None else bias
    for head, row in enumerate(ids):
        if row >= 0:
            total = total + weight[:, head * width : (head + 1) * width] @ table[row]
    return total


def short_conv(
    values: Sequence[Sequence[Vector]], weight: Any, gains: Any, dilation: int, eps: float
) -> list[list[Vector]]:
    """`SiLU(DWConv(RMSNorm(value)))` of `values[position][stream]`; the last tap meets the current token."""
    taps = weight.shape[-1]
    result = []
    for position in range(len(values)):
        streams = []
        for stream, gain in enumerate(gains):
            width = len(gain)
            total = gain * 0
            for tap in range(taps):
                source = position - (taps - 1 - tap) * dilation
                if source >= 0:
                    channels = weight[stream * width : (stream + 1) * width, 0, tap]
                    total = total + channels * rms_norm(values[source][stream], gain, eps)
            streams.append(total * sigmoid(total))
        result.append(streams)
    return result


def engram(
    hidden: Any,
    ids: Sequence[Sequence[Sequence[int]]],
    parameters: Mapping[str, Any],
    *,
    gate: str | None = "signed_sqrt",
    eps: float = 1e-6,
    conv_eps: float = 1e-5,
    dilation: int = 3,
    zero_centred: bool = False,
) -> tuple[list[list[list[Vector]]], list[list[list[Any]]]]:
    """The module's output `[batch][position][stream]` and its gates; `ids` count from the start of the whole table."""
    streams, width = hidden.shape[-2:]
    shift = 1.0 if zero_centred else 0.0
    outputs, gates = [], []
    for hidden_row, ids_row in zip(hidden, ids, strict=True):
        values_row, gates_row = [], []
        for state, token in zip(hidden_row, ids_row, strict=True):
            projected = project(parameters["wkv.weight"], parameters.get("wkv.bias"), parameters["embed.weight"], token)
            value = projected[-width:]
            if all(row < 0 for row in token):
                gates_row.append([0.0] * streams)
                values_row.append([parameters["wkv.weight"][-width:, 0] * 0] * streams)
                continue
            gates_row.append(
                [
                    1.0
                    if gate is None
                    else gate_value(
                        state[stream],
                        projected[stream * width : (stream + 1) * width],
                        parameters["q_weight"][stream] + shift,
                        parameters["k_weight"][stream] + shift,
                        eps,
                        gate,
                    )
                    for stream in range(streams)
                ]
            )
            values_row.append([alpha * value for alpha in gates_row[-1]])
        if "conv.weight" in parameters:
            gains = parameters["conv_norm"] + shift
            branch = short_conv(values_row, parameters["conv.weight"], gains, dilation, conv_eps)
            values_row = [[v + c for v, c in zip(*pair, strict=True)] for pair in zip(values_row, branch, strict=True)]
        outputs.append(values_row)
        gates.append(gates_row)
    return outputs, gates


def over_encoding(embedded: Vector, ids: Sequence[int], table: Any, weight: Any, num_orders: int) -> Vector:
    """Mean of the token's embedding and one projected vector for each n-gram order; `ids` of one token."""
    width = table.shape[1]
    heads = len(ids) // num_orders
    total = embedded
    for order in range(num_orders):
        columns = weight[:, order * heads * width : (order + 1) * heads * width]
        total = total + project(columns, None, table, ids[order * heads : (order + 1) * heads])
    return total / (num_orders + 1)
