"""The specification of `ngram_hash` in plain torch.

Letters: B batch, T tokens, L memory layers, N longest n-gram, O = N-1 orders, H heads of one order, C = O*H columns,
V token ids.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ngram_hash_ref(
    ids: Tensor,
    document_ids: Tensor | None,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor | None,
    *,
    pad_id: int,
    stop_at_pad: bool,
    token_map: Tensor | None = None,
) -> Tensor:
    ids_BT = ids if token_map is None else _compress(ids, token_map)
    length = ids_BT.shape[1]
    multipliers_NL = multipliers.T[:, :, None, None]
    mix_LBT = ids_BT * multipliers_NL[0]
    # Whether look-back has met no obstacle so far. Once closed it stays closed: all older positions read as padding.
    open_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    mixes = []
    for shift in range(1, len(multipliers_NL)):
        # Positions before the start read as dead tokens, and a dead token is an obstacle.
        older_BT = F.pad(ids_BT, (shift, 0), value=-1)[:, :length]
        open_BT = open_BT & (older_BT >= 0)
        if document_ids is not None:
            open_BT = open_BT & (F.pad(document_ids, (shift, 0))[:, :length] == document_ids)
        if stop_at_pad:
            open_BT = open_BT & (older_BT != pad_id)
        mix_LBT = mix_LBT ^ (torch.where(open_BT, older_BT, pad_id) * multipliers_NL[shift])
        mixes.append(mix_LBT)
    mix_LBTO = torch.stack(mixes, dim=-1)
    # No product reaches 2^63, so mixes are non-negative: C's remainder equals Python's.
    hash_ids_LBTC = torch.fmod(mix_LBTO[..., None], primes[:, None, None]).flatten(-2)
    if offsets is not None:
        hash_ids_LBTC += offsets[:, None, None]
    return hash_ids_LBTC.masked_fill_((ids_BT < 0)[..., None], -1)


def _compress(ids_BT: Tensor, map_V: Tensor) -> Tensor:
    known_BT = (ids_BT >= 0) & (ids_BT < len(map_V))
    keys_BT = map_V.index_select(0, torch.where(known_BT, ids_BT, 0).flatten()).view_as(ids_BT)
    return torch.where(known_BT, keys_BT, -1)


def check_token_ids(ids_BT: Tensor, token_map: Tensor) -> None:
    """Raises IndexError that names the first id beyond the map; on a GPU this waits for the device."""
    beyond_BT = ids_BT >= len(token_map)
    if beyond_BT.any():
        row, position = beyond_BT.nonzero()[0].tolist()
        raise IndexError(
            f"token id {int(ids_BT[row, position])} at [{row}, {position}] lies beyond the token map, whose ids are 0 "
            f"to {len(token_map) - 1}"
        )
