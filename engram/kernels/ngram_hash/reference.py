"""The specification of `ngram_hash` in plain torch.

Letters: B batch, T tokens, L memory layers, N longest n-gram, O = N-1 orders, H heads of one order, C = O*H columns.
"""

import torch
import torch.nn.functional as F


def ngram_hash_ref(
    compressed_ids: torch.Tensor,
    document_ids: torch.Tensor | None,
    multipliers: torch.Tensor,
    primes: torch.Tensor,
    offsets: torch.Tensor | None,
    *,
    pad_id: int,
    stop_at_pad: bool,
) -> torch.Tensor:
    ids_BT = compressed_ids
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
