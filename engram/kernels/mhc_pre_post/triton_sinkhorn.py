"""Sinkhorn-Knopp in registers: as many matrices at once as a program has tokens.

Every iterate of M is diag(rows) M diag(columns), so only these vectors are computed; the backward pass computes them
again and keeps those of each step, which no memory outside the program ever sees.

Legend of shapes: T tokens of a program; R rows of coefficients, of which h_pre and h_post come before the G rows of the
matrix; C columns. R and C are powers of two, and what lies beyond the matrix holds zeros.
"""

import triton
import triton.language as tl


@triton.jit
def positive_matrix(logits_TRC, inside_RC):
    """exp(logits), the largest entry of each column scaled to 1 and none so small that a sum could be 0."""
    largest_TC = tl.max(tl.where(inside_RC[None], logits_TRC, float("-inf")), 1)
    m_TRC = tl.exp(tl.where(inside_RC[None], logits_TRC - largest_TC[:, None, :], 0.0))
    # Not a maximum, which would hide NaN.
    m_TRC = tl.where(m_TRC < 1e-20, 1e-20, m_TRC)
    return tl.where(inside_RC[None], m_TRC, 0.0)


@triton.jit
def column_scales(m_TRC, rows_TR, inside_C):
    return 1.0 / tl.where(inside_C[None], tl.sum(m_TRC * rows_TR[:, :, None], 1), 1.0)


@triton.jit
def row_scales(m_TRC, columns_TC, inside_R):
    return 1.0 / tl.where(inside_R[None], tl.sum(m_TRC * columns_TC[:, None, :], 2), 1.0)


@triton.jit
def sinkhorn(m_TRC, inside_RC, STEPS: tl.constexpr):
    """The matrix after STEPS normalisations of its columns, then rows."""
    inside_R, inside_C = tl.max(inside_RC.to(tl.int32), 1) > 0, tl.max(inside_RC.to(tl.int32), 0) > 0
    rows_TR = tl.zeros_like(tl.sum(m_TRC, 2)) + 1.0
    columns_TC = tl.zeros_like(tl.sum(m_TRC, 1)) + 1.0
    for _ in range(STEPS):
        columns_TC = column_scales(m_TRC, rows_TR, inside_C)
        rows_TR = row_scales(m_TRC, columns_TC, inside_R)
    return m_TRC * rows_TR[:, :, None] * columns_TC[:, None, :]


@triton.jit
def sinkhorn_backward(m_TRC, gradient_TRC, inside_RC, STEPS: tl.constexpr, STEPS_PADDED: tl.constexpr):
    """Gradient with respect to the logits, from the one with respect to the normalised matrix."""
    inside_R, inside_C = tl.max(inside_RC.to(tl.int32), 1) > 0, tl.max(inside_RC.to(tl.int32), 0) > 0
    step_S = tl.arange(0, STEPS_PADDED)
    rows_TR = tl.zeros_like(tl.sum(m_TRC, 2)) + 1.0
    columns_TC = tl.zeros_like(tl.sum(m_TRC, 1)) + 1.0
    # The scales of the rows before each step.
    history_TSR = tl.zeros_like(rows_TR)[:, None, :] + tl.zeros([1, STEPS_PADDED, 1], tl.float32)
    for step in range(STEPS):
        history_TSR = tl.where(step_S[None, :, None] == step, rows_TR[:, None, :], history_TSR)
        columns_TC = column_scales(m_TRC, rows_TR, inside_C)
        rows_TR = row_scales(m_TRC, columns_TC, inside_R)

    entry_TRC = gradient_TRC * m_TRC
    of_rows_TR = tl.sum(entry_TRC * columns_TC[:, None, :], 2)
    of_columns_TC = tl.sum(entry_TRC * rows_TR[:, :, None], 1)
    of_m_TRC = gradient_TRC * rows_TR[:, :, None] * columns_TC[:, None, :]
    for back in range(STEPS):
        before_TR = tl.sum(tl.where(step_S[None, :, None] == STEPS - 1 - back, history_TSR, 0.0), 1)
        columns_TC = column_scales(m_TRC, before_TR, inside_C)
        # The square of a scale may overflow; its product with the small gradient does not.
        of_sums_TR = -rows_TR * (rows_TR * of_rows_TR)
        of_m_TRC += of_sums_TR[:, :, None] * columns_TC[:, None, :]
        of_columns_TC += tl.sum(of_sums_TR[:, :, None] * m_TRC, 1)
        of_sums_TC = -columns_TC * (columns_TC * of_columns_TC)
        of_m_TRC += of_sums_TC[:, None, :] * before_TR[:, :, None]
        of_rows_TR = tl.sum(of_sums_TC[:, None, :] * m_TRC, 2)
        of_columns_TC = tl.zeros_like(of_columns_TC)
        rows_TR = before_TR
    # Entries at the floor do not follow their logits.
    return tl.where(inside_RC[None] & (m_TRC > 1e-20), of_m_TRC * m_TRC, 0.0)
