"""linear_kl's Triton kernels: what of a row's logits the loss needs, and the logits' gradient.

Shapes: c rows, v vocabulary entries of this rank, splits: programs that share a row's columns.

Statistics read student's and teacher's logits once and keep, per split and row, a maximum and sums
of exponentials about it; the merge joins splits (of all ranks) and leaves a few numbers per row;
the gradient reads the logits again and writes over the student's. The jsd needs both log-sums
before its own sums, hence one more reading. With x the logits, s student and t teacher, M the
maximum, Z = sum of exp((x - M) / T) and L = M / T + log Z, the row's divergence is

    forward   sum(exp((x_t - M_t) / T) (x_t - x_s)) / (T Z_t) - L_t + L_s
    reverse   sum(exp((x_s - M_s) / T) (x_s - x_t)) / (T Z_s) - L_s + L_t

whose sums grow with the columns like Z: when M moves, both shrink by one factor.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a split stores of a row, and what the merge leaves of it: [7, c] and [7, c] float32.
NUM_STATISTICS = 7  # student: maximum, Z at T = 1, label's logit, Z; teacher: maximum, Z, the sum
NUM_FACTORS = 7

# Stands for minus infinity, whose difference from itself would be NaN.
_LOWEST = tl.constexpr(-1.0e38)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Blocks of logits that a program reads before it adds them up under one maximum.
GROUP = tl.constexpr(2)


@triton.jit
def _exp(x):
    """e^x through exp2, which flushes what would be subnormal: half the instructions of exp."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _load_group(row, columns, num_columns, BLOCK: tl.constexpr):
    """A row's logits at `columns` and in the blocks that follow, in float32."""
    return (
        tl.load(row + columns, mask=columns < num_columns, other=_LOWEST).to(tl.float32),
        tl.load(row + columns + BLOCK, mask=columns + BLOCK < num_columns, other=_LOWEST).to(
            tl.float32
        ),
    )


@triton.jit
def _mixture(r, beta):
    """(log p / m, log q / m) of m = beta p + (1 - beta) q, from r = log p / q.

    log(m / q) = log(1 - beta + beta e^r), written about the larger of p and q so that nothing
    overflows.
    """
    weight = tl.where(r > 0, 1 - beta, beta)
    log_m = tl.log(1 + weight * (_exp(-tl.abs(r)) - 1))
    return tl.minimum(r, 0.0) - log_m, -tl.maximum(r, 0.0) - log_m


@triton.jit(do_not_specialize=["num_rows", "first_column"])
def statistics_kernel(
    student,  # [c, v]
    teacher,  # [c, v]
    labels,  # [c]
    loss_mask,  # [c]
    statistics,  # [splits, 7, c], or [splits, 3, c] without a teacher
    num_rows,
    student_stride,
    teacher_stride,
    num_columns,
    first_column,
    softening,
    HAS_TEACHER: tl.constexpr,
    IS_SOFT: tl.constexpr,  # T other than 1
    KIND: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,  # of a split
    BLOCK: tl.constexpr,
):
    """One split of a row: lane by lane over its columns, lanes joined at the end."""
    row, split = tl.program_id(0), tl.program_id(1)
    if tl.load(loss_mask + row) == 0:
        return
    begin = split * (NUM_BLOCKS * BLOCK)
    student += row.to(tl.int64) * student_stride
    teacher += row.to(tl.int64) * teacher_stride
    lanes = tl.arange(0, BLOCK)
    max_s = tl.full([BLOCK], _LOWEST, tl.float32)
    hard_z = tl.zeros([BLOCK], tl.float32)
    soft_z = tl.zeros([BLOCK], tl.float32)
    max_t = tl.full([BLOCK], _LOWEST, tl.float32)
    target_z = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    factor = 1.0
    if IS_SOFT:
        factor = softening
    for group in range(NUM_BLOCKS // GROUP):
        columns = begin + group * (GROUP * BLOCK) + lanes
        x_s = _load_group(student, columns, num_columns, BLOCK)
        x_t = x_s
        if HAS_TEACHER:
            x_t = _load_group(teacher, columns, num_columns, BLOCK)
        top_s = tl.maximum(max_s, tl.maximum(x_s[0], x_s[1]))
        hard_z *= _exp(max_s - top_s)
        top_t = top_s
        if HAS_TEACHER:
            top_t = tl.maximum(max_t, tl.maximum(x_t[0], x_t[1]))
            fade_s, fade_t = _exp((max_s - top_s) * factor), _exp((max_t - top_t) * factor)
            soft_z *= fade_s
            target_z *= fade_t
            if KIND == "forward":
                weighted *= fade_t
            if KIND == "reverse":
                weighted *= fade_s
        for u in tl.static_range(GROUP):
            from_s = x_s[u] - top_s
            hard_z += _exp(from_s)
            if HAS_TEACHER:
                new_s, new_t = _exp(from_s * factor), _exp((x_t[u] - top_t) * factor)
                soft_z += new_s
                target_z += new_t
                if KIND == "forward":
                    weighted += new_t * (x_t[u] - x_s[u])
                if KIND == "reverse":
                    weighted += new_s * (x_s[u] - x_t[u])
        max_s, max_t = top_s, top_t

    # Lanes without a column hold the lowest maximum: their factor is 0.
    maximum = tl.max(max_s, 0)
    hard = tl.sum(hard_z * _exp(max_s - maximum), 0)
    label = tl.load(labels + row) - first_column
    has_label = (label >= begin) & (label < begin + NUM_BLOCKS * BLOCK) & (label < num_columns)
    label_logit = tl.load(student + label, mask=has_label, other=_LOWEST).to(tl.float32)
    stored = 3
    if HAS_TEACHER:
        stored = 7
    statistics += split.to(tl.int64) * stored * num_rows + row
    tl.store(statistics, maximum)
    tl.store(statistics + num_rows, hard)
    tl.store(statistics + 2 * num_rows, label_logit)
    if HAS_TEACHER:
        factor_s = _exp((max_s - maximum) * softening)
        tl.store(statistics + 3 * num_rows, tl.sum(soft_z * factor_s, 0))
        maximum_t = tl.max(max_t, 0)
        factor_t = _exp((max_t - maximum_t) * softening)
        tl.store(statistics + 4 * num_rows, maximum_t)
        tl.store(statistics + 5 * num_rows, tl.sum(target_z * factor_t, 0))
        if KIND == "forward":
            tl.store(statistics + 6 * num_rows, tl.sum(weighted * factor_t, 0))
        if KIND == "reverse":
            tl.store(statistics + 6 * num_rows, tl.sum(weighted * factor_s, 0))


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def merge_kernel(
    statistics,  # [splits of all ranks, 7 or 3, c]
    loss_mask,  # [c]
    kl_rows,  # [c], the divergence times mask and T^2
    ce_rows,  # [c], the cross entropy times mask
    factors,  # [7, c], see the end
    num_rows,
    num_splits,
    kl_weight,
    ce_weight,
    temperature,
    HAS_TEACHER: tl.constexpr,
    KIND: tl.constexpr,
    SPLITS: tl.constexpr,  # num_splits, rounded up to a power of two
    ROWS: tl.constexpr,
):
    """Join the splits of ROWS rows, and leave each row's losses and the factors of its gradient."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    split = tl.arange(0, SPLITS)[:, None]
    stored = 3
    if HAS_TEACHER:
        stored = 7
    # [SPLITS, ROWS]
    statistics += split.to(tl.int64) * stored * num_rows + row[None, :]
    mask = tl.load(loss_mask + row, mask=is_row, other=0.0)
    counts = mask != 0
    # A split that is not there has the lowest maximum and so the factor 0; where no split is there,
    # the row does not count, and every number below is finite.
    is_split = counts[None, :] & (split < num_splits)

    max_s = tl.load(statistics, mask=is_split, other=_LOWEST)
    maximum = tl.max(max_s, 0)
    gap_s = max_s - maximum[None, :]
    hard_z = tl.load(statistics + num_rows, mask=is_split, other=1.0)
    hard_z = tl.sum(hard_z * _exp(gap_s), 0)
    label = tl.load(statistics + 2 * num_rows, mask=is_split, other=_LOWEST)
    ce = tl.log(hard_z) + maximum - tl.max(label, 0)
    tl.store(ce_rows + row, tl.where(counts, ce * mask, 0.0), mask=is_row)
    tl.store(factors + row, maximum, mask=is_row)
    tl.store(factors + num_rows + row, ce_weight * mask / hard_z, mask=is_row)
    if HAS_TEACHER:
        softening = 1 / temperature
        soft_z = tl.load(statistics + 3 * num_rows, mask=is_split, other=1.0)
        soft_z = tl.sum(soft_z * _exp(gap_s * softening), 0)
        max_t = tl.load(statistics + 4 * num_rows, mask=is_split, other=_LOWEST)
        maximum_t = tl.max(max_t, 0)
        factor_t = _exp((max_t - maximum_t[None, :]) * softening)
        target_z = tl.load(statistics + 5 * num_rows, mask=is_split, other=1.0)
        target_z = tl.sum(target_z * factor_t, 0)
        # log Z_t / Z_s, and L_t - L_s
        log_ratio = tl.log(target_z) - tl.log(soft_z)
        shift = (maximum_t - maximum) * softening + log_ratio
        # T^2 of the loss times 1 / T of the softened logits.
        scale = kl_weight * temperature * mask
        last = log_ratio
        if KIND == "forward":
            weighted = tl.load(statistics + 6 * num_rows, mask=is_split, other=0.0)
            kl = tl.sum(weighted * factor_t, 0) / target_z * softening - shift
            last = scale / target_z
        if KIND == "reverse":
            weighted = tl.load(statistics + 6 * num_rows, mask=is_split, other=0.0)
            kl = tl.sum(weighted * _exp(gap_s * softening), 0) / soft_z * softening + shift
            last = kl - log_ratio
        if KIND != "jsd":
            kl = kl * temperature * temperature
            tl.store(kl_rows + row, tl.where(counts, kl * mask, 0.0), mask=is_row)
        tl.store(factors + 2 * num_rows + row, scale / soft_z, mask=is_row)
        tl.store(factors + 3 * num_rows + row, maximum_t, mask=is_row)
        tl.store(factors + 4 * num_rows + row, last, mask=is_row)
        if KIND == "jsd":
            tl.store(factors + 5 * num_rows + row, 1 / soft_z, mask=is_row)
            tl.store(factors + 6 * num_rows + row, 1 / target_z, mask=is_row)


@triton.jit(do_not_specialize=["num_rows"])
def jsd_sums_kernel(
    student,  # [c, v]
    teacher,  # [c, v]
    loss_mask,  # [c]
    factors,  # [7, c]
    sums,  # [splits, 2, c]: of KL(p || m) and of KL(q || m)
    num_rows,
    student_stride,
    teacher_stride,
    num_columns,
    softening,
    beta,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One split of a row, once both log-sums are known."""
    row, split = tl.program_id(0), tl.program_id(1)
    if tl.load(loss_mask + row) == 0:
        return
    begin = split * (NUM_BLOCKS * BLOCK)
    student += row.to(tl.int64) * student_stride
    teacher += row.to(tl.int64) * teacher_stride
    maximum = tl.load(factors + row)
    maximum_t = tl.load(factors + 3 * num_rows + row)
    log_ratio = tl.load(factors + 4 * num_rows + row)
    lanes = tl.arange(0, BLOCK)
    of_p = tl.zeros([BLOCK], tl.float32)
    of_q = tl.zeros([BLOCK], tl.float32)
    for block in range(NUM_BLOCKS):
        columns = begin + block * BLOCK + lanes
        # Columns past the end have probability 0, and 0 times a finite logarithm.
        x_s = tl.load(student + columns, mask=columns < num_columns, other=_LOWEST).to(tl.float32)
        x_t = tl.load(teacher + columns, mask=columns < num_columns, other=_LOWEST).to(tl.float32)
        from_s, from_t = (x_s - maximum) * softening, (x_t - maximum_t) * softening
        log_p_m, log_q_m = _mixture(from_t - from_s - log_ratio, beta)
        of_p += _exp(from_t) * log_p_m
        of_q += _exp(from_s) * log_q_m
    sums += split.to(tl.int64) * 2 * num_rows + row
    tl.store(sums, tl.sum(of_p, 0) * tl.load(factors + 6 * num_rows + row))
    tl.store(sums + num_rows, tl.sum(of_q, 0) * tl.load(factors + 5 * num_rows + row))


@triton.jit
def scale_kernel(
    source,  # float32
    target,  # may begin where source does, if half as wide or less and end is 2 begin at most
    scale,  # one number
    begin,
    end,
    BLOCK: tl.constexpr,
):
    """target = source * scale, of elements `begin` to `end`."""
    places = begin + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + places, mask=places < end) * tl.load(scale)
    tl.store(target + places, x.to(target.dtype.element_ty), mask=places < end)


@triton.jit(do_not_specialize=["num_rows", "first_column"])
def gradient_kernel(
    student,  # [c, v]
    teacher,  # [c, v]
    labels,  # [c]
    loss_mask,  # [c]
    factors,  # [7, c]
    gradient,  # [c, v], may be the student's logits
    num_rows,
    student_stride,
    teacher_stride,
    gradient_stride,
    num_columns,
    first_column,
    ce_weight,
    softening,
    beta,
    HAS_TEACHER: tl.constexpr,
    IS_SOFT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of a row's columns: the weighted loss's gradient of the student's logits."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < num_columns
    gradient += row.to(tl.int64) * gradient_stride
    mask = tl.load(loss_mask + row)
    if mask == 0:
        zeros = tl.zeros([BLOCK], tl.float32).to(gradient.dtype.element_ty)
        tl.store(gradient + columns, zeros, mask=is_column)
        return
    student += row.to(tl.int64) * student_stride
    teacher += row.to(tl.int64) * teacher_stride
    x_s = tl.load(student + columns, mask=is_column, other=_LOWEST).to(tl.float32)
    x_t = x_s
    if HAS_TEACHER:
        x_t = tl.load(teacher + columns, mask=is_column, other=_LOWEST).to(tl.float32)
    maximum = tl.load(factors + row)
    hard = tl.load(factors + num_rows + row)
    label = (tl.load(labels + row) - first_column).to(tl.int32)
    from_s = x_s - maximum
    q = _exp(from_s)
    result = q * hard
    if HAS_TEACHER:
        # Both from their maxima before they meet: of large logits, the small differences count.
        from_t = x_t - tl.load(factors + 3 * num_rows + row)
        if IS_SOFT:
            from_s *= softening
            from_t *= softening
            q = _exp(from_s)
        soft = tl.load(factors + 2 * num_rows + row)
        last = tl.load(factors + 4 * num_rows + row)
        if KIND == "forward":
            result += q * soft - _exp(from_t) * last
        if KIND == "reverse":
            result += q * soft * (from_s - from_t - last)
        if KIND == "jsd":
            log_p_m, log_q_m = _mixture(from_t - from_s - last, beta)
            q_to_m = tl.load(factors + 5 * num_rows + row)
            result += q * soft * (1 - beta) * (log_q_m - q_to_m)
    result = tl.where(columns == label, result - ce_weight * mask, result)
    tl.store(gradient + columns, result.to(gradient.dtype.element_ty), mask=is_column)
