"""Text from a model: one token at a time, each drawn from the distribution after all tokens before it.

Legend: B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engram.config import UserError
from engram.inference.cache import Decoder
from engram.model.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    tokens: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
) -> Tensor:
    """Continue prompts of equal length, [B, T] -> int64 [B, T + n], n <= max_new_tokens.

    Temperature 0 takes the likeliest token. A row's samples depend on its prompt, `seed` and its place in the batch,
    not on its neighbours. After `eos_id` a row repeats it; when all rows have ended, n is shorter. Prompts are not
    padded, because padding on the left would change the n-grams. Raises UserError: no prompt, a setting out of range.
    """
    device = model.head.weight.device
    rows_BT = torch.as_tensor(tokens, dtype=torch.int64, device=device)
    _check(model, rows_BT, max_new_tokens, temperature, top_k, top_p)
    was_training = model.training
    model.eval()
    uniform_BN = torch.stack([_uniform(max_new_tokens, seed, row) for row in range(len(rows_BT))]).to(device)
    ended_B = torch.zeros(len(rows_BT), dtype=torch.bool, device=device)
    decoder = Decoder(model, len(rows_BT), rows_BT.shape[1] + max_new_tokens)
    for uniform_B in uniform_BN.unbind(1):
        logits_BV = decoder.feed(rows_BT[:, decoder.length :])
        next_B = choose(logits_BV, uniform_B, temperature, top_k, top_p)
        if eos_id is not None:
            next_B = next_B.masked_fill(ended_B, eos_id)
            ended_B |= next_B == eos_id
        rows_BT = torch.cat((rows_BT, next_B.unsqueeze(1)), dim=1)
        # Waits for the GPU once a token. The next token needs this one anyway, so that only its first launches come
        # late; looking less often would compute tokens that nobody wants.
        if eos_id is not None and ended_B.all():
            break
    model.train(was_training)
    return rows_BT


def choose(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Token ids int64 [B]: the point of the cumulated distribution that `uniform_B` in [0, 1) falls on.

    `top_k` keeps the k likeliest tokens; `top_p` the fewest whose probabilities reach p (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    probabilities_BV = torch.softmax(logits_BV.double() / temperature, dim=-1)
    sorted_BV, ids_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        sorted_BV[:, top_k:] = 0
    if top_p is not None:
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        sorted_BV = sorted_BV.masked_fill(before_BV >= top_p, 0)
    cumulated_BV = sorted_BV.cumsum(-1)
    point_B1 = (uniform_B.double() * cumulated_BV[:, -1]).unsqueeze(1)
    place_B1 = torch.searchsorted(cumulated_BV, point_B1, right=True).clamp(max=logits_BV.shape[-1] - 1)
    return ids_BV.gather(1, place_B1).squeeze(1)


def _uniform(count: int, seed: int, row: int) -> Tensor:
    # Drawn on the CPU: the same numbers for every device.
    return torch.rand(count, generator=torch.Generator().manual_seed(seed + row), dtype=torch.float64)


def _check(
    model: Transformer,
    tokens_BT: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    vocab_size = model.config.vocab_size
    if tokens_BT.ndim != 2 or not tokens_BT.numel():
        raise UserError("the prompt is empty: give at least one token")
    outside = tokens_BT[(tokens_BT < 0) | (tokens_BT >= vocab_size)]
    if outside.numel():
        raise UserError(
            f"the prompt holds token {int(outside[0])}, but the model's ids are 0 to {vocab_size - 1}: "
            "use the tokenizer that the model was trained with"
        )
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}, but must be 0 or more")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature}, but must be 0 (the likeliest token) or more, and finite")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise UserError(f"top_k is {top_k}, but must be 1 to {vocab_size} (the vocabulary)")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}, but must be above 0 and at most 1")
