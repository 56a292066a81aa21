"""Linear CKA (Kornblith et al. 2019, arXiv 1905.00414) with the unbiased HSIC, every pair of layers at once.

    K = X X',  L = Y Y',  K~ and L~ the same with a zero diagonal
    HSIC1 = [ tr(K~ L~) + (1'K~1)(1'L~1) / ((n-1)(n-2)) - 2 / (n-2) 1'K~L~1 ] / (n (n-3))
    CKA   = mean_b HSIC1(X_b, Y_b) / sqrt( mean_b HSIC1(X_b, X_b) mean_b HSIC1(Y_b, Y_b) )

over batches b of positions (Nguyen et al. 2021, arXiv 2010.15327): a ratio of means, never a mean of ratios. All in
float64 after a common offset was taken off, to which HSIC1 is blind and rounding is not.

Legend: P, Q layers of two models, N positions of a batch (n rows of them), D, E hidden; `...` draws or nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram.config import UserError

Array = npt.NDArray[np.float64]

# Numbers of the kernel rows held at once: 2^24 float64 values are 128 MiB.
_KERNEL = 2**24
# Numbers of all products X'Y that the streaming form keeps: 1 GiB.
_PRODUCTS = 2**27


def hsic(x_PND: Tensor, y_QNE: Tensor) -> Tensor:
    """HSIC1 of all pairs of layers, float64 [P, Q]. Raises UserError for fewer than 4 positions."""
    n = _check(x_PND, y_QNE, 4)
    trace_NPQ, cross_NPQ, a_PN, b_QN = _kernel_sums(centred(x_PND), centred(y_QNE))
    return _unbiased(trace_NPQ.sum(0), a_PN.sum(1)[:, None], b_QN.sum(1), a_PN @ b_QN.T, n)


def contributions(x_PND: Tensor, y_QNE: Tensor) -> Tensor:
    """What each position adds: phi_i = N HSIC1 - (N-1) HSIC1 without i, float64 [N, P, Q], whose mean is HSIC1 itself.

    Bootstraps draw positions by weighting these: drawing the positions themselves would put a position beside its own
    copy, which looks like similarity. Raises UserError for fewer than 5 positions.
    """
    n = _check(x_PND, y_QNE, 5)
    trace_NPQ, cross_NPQ, a_PN, b_QN = _kernel_sums(centred(x_PND), centred(y_QNE))
    trace_PQ, a_P, b_Q, cross_PQ = trace_NPQ.sum(0), a_PN.sum(1)[:, None], b_QN.sum(1), a_PN @ b_QN.T
    a_NP1, b_N1Q = a_PN.T[:, :, None], b_QN.T[:, None, :]
    # Row sums of every other position lose its kernel with the one that leaves.
    without_NPQ = cross_PQ - a_NP1 * b_N1Q - cross_NPQ + trace_NPQ
    left_NPQ = _unbiased(trace_PQ - 2 * trace_NPQ, a_P - 2 * a_NP1, b_Q - 2 * b_N1Q, without_NPQ, n - 1)
    return n * _unbiased(trace_PQ, a_P, b_Q, cross_PQ, n) - (n - 1) * left_NPQ


class StreamingHsic:
    """HSIC1 over all positions in a single pass: exactly the value of the whole kernel, which is never built.

    With C = X'Y, s = sum x, t = sum y, k = |x|^2, l = |y|^2:  tr(K~L~) = |C|^2 - sum k l,  1'K~1 = |s|^2 - sum k,
    1'K~L~1 = s'Ct - s'(sum x l) - t'(sum y k) + sum k l.
    """

    def __init__(self) -> None:
        self._count = 0
        self._offsets: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def add(self, x_PND: Tensor, y_QNE: Tensor) -> None:
        """Positions [N] of both models. Raises UserError where the products of all pairs take too much memory."""
        x, y = x_PND.double(), y_QNE.double()
        if self._offsets is None:
            products = x.shape[0] * x.shape[2] * y.shape[0] * y.shape[2]
            if products > _PRODUCTS:
                raise UserError(
                    f"the exact form needs {products * 8 / 2**30:.1f} GiB for products of all pairs of layers, "
                    f"above its limit of {_PRODUCTS * 8 / 2**30:.0f} GiB: leave --exact away"
                )
            # About the mean of the data: near enough that no digits are lost.
            self._offsets = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - self._offsets[0], y - self._offsets[1]
        k_PN, l_QN = x.square().sum(2), y.square().sum(2)
        wide_x, wide_y = x.transpose(1, 2).flatten(0, 1), y.transpose(1, 2).flatten(0, 1)
        sums = [
            (wide_x @ wide_y.T).unflatten(0, (len(x), -1)).unflatten(2, (len(y), -1)),
            x.sum(1),
            y.sum(1),
            k_PN.sum(1),
            l_QN.sum(1),
            k_PN @ l_QN.T,
            (wide_x @ l_QN.T).unflatten(0, (len(x), -1)),
            (wide_y @ k_PN.T).unflatten(0, (len(y), -1)),
        ]
        self._sums = [old + new for old, new in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._count += x.shape[1]

    def value(self) -> Tensor:
        """Float64 [P, Q]. Raises UserError for fewer than 4 positions."""
        if self._count < 4:
            raise UserError(f"{self._count} positions: the unbiased HSIC needs 4 at least: give more")
        c_PDQE, s_PD, t_QE, k_P, l_Q, kl_PQ, xl_PDQ, yk_QEP = self._sums
        cross_PQ = torch.einsum("pd,pdqe,qe->pq", s_PD, c_PDQE, t_QE) + kl_PQ
        cross_PQ -= torch.einsum("pd,pdq->pq", s_PD, xl_PDQ) + torch.einsum("qe,qep->pq", t_QE, yk_QEP)
        a_P1 = (s_PD.square().sum(1) - k_P)[:, None]
        return _unbiased(c_PDQE.square().sum((1, 3)) - kl_PQ, a_P1, t_QE.square().sum(1) - l_Q, cross_PQ, self._count)


def cka(xy: npt.ArrayLike, xx: npt.ArrayLike, yy: npt.ArrayLike) -> Array:
    """xy / sqrt(xx yy) of HSICs [..., P, Q], [..., P], [..., Q]; NaN where one of the latter is not positive."""
    xy, xx, yy = (np.asarray(part, np.float64) for part in (xy, xx, yy))
    valid = (xx > 0)[..., :, None] & (yy > 0)[..., None, :]
    scale = np.sqrt(np.where(xx > 0, xx, 1))[..., :, None] * np.sqrt(np.where(yy > 0, yy, 1))[..., None, :]
    return np.where(valid, xy / scale, np.nan)


def centred(x_PND: Tensor) -> Tensor:
    """Float64, with each layer's mean taken off."""
    # The mean of equal numbers need not be that number; the mean of zeros is.
    x = x_PND.double() - x_PND[:, :1].double()
    return x - x.mean(1, keepdim=True)


def _check(x_PND: Tensor, y_QNE: Tensor, least: int) -> int:
    n = x_PND.shape[1]
    assert y_QNE.shape[1] == n, "both models' states are of the same positions"
    if n < least:
        what = "the unbiased HSIC" if least == 4 else "its interval"
        raise UserError(f"{n} positions in a batch: {what} needs {least} at least: raise --batch, or give more text")
    return n


def _unbiased(trace: Tensor, a: Tensor, b: Tensor, cross: Tensor, n: int) -> Tensor:
    return (trace + a * b / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))


def _kernel_sums(x_PND: Tensor, y_QNE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum_j K~_ij L~_ij [N, P, Q], (L~ a)_i + (K~ b)_i [N, P, Q], and the row sums a = K~1 [P, N], b = L~1 [Q, N]."""
    n = x_PND.shape[1]
    a_PN, b_QN = _row_sums(x_PND), _row_sums(y_QNE)
    trace, cross = [], []
    for rows in torch.arange(n, device=x_PND.device).split(max(1, _KERNEL // ((len(x_PND) + len(y_QNE)) * n))):
        k_PnN, l_QnN = _kernel_rows(x_PND, rows), _kernel_rows(y_QNE, rows)
        trace.append(k_PnN.transpose(0, 1) @ l_QnN.permute(1, 2, 0))
        cross.append((l_QnN @ a_PN.T).permute(1, 2, 0) + (k_PnN @ b_QN.T).transpose(0, 1))
    return torch.cat(trace), torch.cat(cross), a_PN, b_QN


def _row_sums(x_PND: Tensor) -> Tensor:
    return (x_PND @ x_PND.sum(1).unsqueeze(2)).squeeze(2) - x_PND.square().sum(2)


def _kernel_rows(x_PND: Tensor, rows: Tensor) -> Tensor:
    kernel_PnN = x_PND[:, rows] @ x_PND.transpose(1, 2)
    kernel_PnN[:, torch.arange(len(rows), device=rows.device), rows] = 0
    return kernel_PnN
