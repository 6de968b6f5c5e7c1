"""Triton: the sums of the gradients of each row, and its update.

Every id of a batch gets a key, the number of its row among the rows of all tables, which are counted width by width.
Sorted by key (stable, so that a row's occurrences stay in the order of the batch), the occurrences of a row are a run:

    keys of the batch   7 2 7 7 2         places of their gradients   a b c d e
    sorted              2 2 7 7 7                                     b e a c d
    runs                firsts = [0 2 5]

`update` takes a tile of runs, adds up each one's gradients one after another and updates each row once.  So that a run
of thousands is not one program's work from end to end, `fold` has first added up every PIECE sorted occurrences that
are all of one row (their first and last key are equal), and `fold_pieces` every PIECES of such sums; `update` then adds

    the occurrences up to the first whole piece, whole pieces, pieces of pieces, whole pieces, the occurrences left over

whose order depends on the batch alone.  No float is added by an atomic, and tiles are fixed per width: results repeat
themselves bit for bit.

Letters in shapes: B bags of a feature, F features, T tables in the order of keys, N ids, R runs of a tile, D columns.
"""

import triton
import triton.language as tl

from kernels.backends._triton_rows import bags_of, ids_at, load_rows, store_rows

PIECE = 128  # occurrences: a tile of `fold` is 32 steps of four rows
PIECES = 64  # a piece of pieces is 8192 occurrences


@triton.jit(do_not_specialize=["bags", "ids", "columns", "width"])
def make_keys(
    ids_N,
    offsets,
    scales_N,  # float32 weights of ids; any tensor where not WEIGHTED
    bases_F,  # int64: the key of the first row of the feature's table
    rows_F,
    columns_F,
    keys_N,  # filled with a key beyond all tables, which ids outside their table keep
    places_N,  # where the gradient of each id is, in elements of grad
    factors_N,  # float32: what that gradient is multiplied with; untouched where neither WEIGHTED nor MEAN
    bags,
    ids,
    columns,
    width,  # columns of a row of grad where not POOLED
    WEIGHTED: tl.constexpr,
    MEAN: tl.constexpr,
    POOLED: tl.constexpr,
    BAGS: tl.constexpr,
    LANES: tl.constexpr,  # ids of a bag side by side
):
    f = tl.program_id(1)
    b_B = tl.program_id(0) * BAGS + tl.arange(0, BAGS)
    here = b_B < bags
    first_B, length_B, _, _ = bags_of(offsets, f.to(tl.int64) * bags + b_B, here, ids)
    base = tl.load(bases_F + f)
    rows = tl.load(rows_F + f)
    place_B = b_B.to(tl.int64) * columns + tl.load(columns_F + f)
    lane = tl.arange(0, LANES)
    for k in range(0, tl.max(length_B, axis=0), LANES):
        ok = (k + lane)[None, :] < length_B[:, None]
        at = first_B[:, None] + k + lane[None, :]
        id = ids_at(ids_N, at, ok)
        ok = ok & (id >= 0) & (id < rows)
        tl.store(keys_N + at, base + id, mask=ok)
        if POOLED:
            tl.store(places_N + at, place_B[:, None] + at * 0, mask=ok)
        else:
            tl.store(places_N + at, at * width, mask=ok)
        if WEIGHTED or MEAN:
            factor = ok.to(tl.float32)
            if WEIGHTED:
                factor = tl.load(scales_N + at, mask=ok, other=0.0)
            if MEAN:
                factor = factor / tl.maximum(length_B, 1).to(tl.float32)[:, None]
            tl.store(factors_N + at, factor, mask=ok)


@triton.jit(do_not_specialize=["ids", "widths"])
def find_runs(
    keys_N,  # sorted
    order_N,  # int64: where in the batch each of them was
    counts_N,  # int32: how many runs have begun, up to and with each
    places_N,
    factors_N,
    bases_W,  # (W + 1,) int64: the first key of each width; the last is the key of ids outside their table
    firsts_N,  # out (N + 1,) int32: where each run begins; one more at the end
    bounds_W,  # out (W + 1,) int32: the first run of each width
    sorted_places_N,  # out
    sorted_factors_N,  # out
    ids,
    widths,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < ids
    key = tl.load(keys_N + i, mask=here, other=0).to(tl.int64)
    key = tl.where(here, key, 0x7FFFFFFFFFFFFFFF)
    before = tl.load(keys_N + i - 1, mask=(i > 0) & (i <= ids), other=-1).to(tl.int64)
    run = tl.load(counts_N + i - 1, mask=(i > 0) & (i <= ids), other=0)  # runs that begin before i
    begins = (i <= ids) & (key != before)
    tl.store(firsts_N + run, i.to(tl.int32), mask=begins)
    for w in range(widths + 1):
        base = tl.load(bases_W + w)
        tl.store(bounds_W + w + run * 0, run, mask=begins & (before < base) & (key >= base))
    whole = here & (key < tl.load(bases_W + widths))
    order = tl.load(order_N + i, mask=whole, other=0)
    tl.store(sorted_places_N + i, tl.load(places_N + order, mask=whole, other=0), mask=whole)
    if SCALED:
        tl.store(sorted_factors_N + i, tl.load(factors_N + order, mask=whole, other=0.0), mask=whole)


@triton.jit
def _gradient(
    grad,
    places_N,
    factors_N,
    at_R,
    ok_R,
    d,
    max_gradient,
    CLAMP: tl.constexpr,
    SCALED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """(R, BLOCK_D) float32: the gradients of the sorted occurrences at_R."""
    place_R = tl.load(places_N + at_R, mask=ok_R, other=0).to(tl.int64)
    rows = load_rows(grad, place_R, ok_R, d, D, BLOCK_D, ALIGN)
    if CLAMP:
        rows = tl.minimum(tl.maximum(rows, -max_gradient), max_gradient)
    if SCALED:
        rows = rows * tl.load(factors_N + at_R, mask=ok_R, other=0.0)[:, None]
    return rows


@triton.jit
def _is_piece(keys_N, first_R, size: tl.constexpr, ids, low, high):
    """Whether the `size` sorted occurrences from first_R are all of one row of this width."""
    inside = first_R + size <= ids
    first_key = tl.load(keys_N + first_R, mask=inside, other=0)
    last_key = tl.load(keys_N + first_R + size - 1, mask=inside, other=0)
    return inside & (first_key == last_key) & (first_key >= low) & (first_key < high)


@triton.jit(do_not_specialize=["ids", "low", "high"])
def fold(
    keys_N,
    places_N,
    factors_N,
    grad,
    sums,  # out: (N // PIECE, D) float32; rows of pieces that are not of one row stay as they are
    ids,
    low,  # keys of this width: low <= key < high
    high,
    max_gradient,
    CLAMP: tl.constexpr,
    SCALED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_SUMS: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
):
    r_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    piece_R = _is_piece(keys_N, r_R * PIECE, PIECE, ids, low, high)
    total = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    steps = tl.max(piece_R.to(tl.int32), axis=0) * PIECE
    for k in range(0, steps, 4):
        at = r_R * PIECE + k
        one = _gradient(grad, places_N, factors_N, at, piece_R, d, max_gradient, CLAMP, SCALED, D, BLOCK_D, ALIGN)
        two = _gradient(grad, places_N, factors_N, at + 1, piece_R, d, max_gradient, CLAMP, SCALED, D, BLOCK_D, ALIGN)
        three = _gradient(grad, places_N, factors_N, at + 2, piece_R, d, max_gradient, CLAMP, SCALED, D, BLOCK_D, ALIGN)
        four = _gradient(grad, places_N, factors_N, at + 3, piece_R, d, max_gradient, CLAMP, SCALED, D, BLOCK_D, ALIGN)
        total += one
        total += two
        total += three
        total += four
    store_rows(sums, r_R * D, piece_R, total, d, D, BLOCK_D, ALIGN_SUMS)


@triton.jit(do_not_specialize=["ids", "low", "high"])
def fold_pieces(
    keys_N,
    sums,
    more,  # out: (N // (PIECE * PIECES), D) float32
    ids,
    low,
    high,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN_SUMS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
):
    r_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    piece_R = _is_piece(keys_N, r_R * (PIECE * PIECES), PIECE * PIECES, ids, low, high)
    total = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    first_R = r_R * PIECES
    end_R = tl.where(piece_R, first_R + PIECES, first_R)
    total = _add_rows(total, sums, first_R, end_R, d, D, BLOCK_D, ALIGN_SUMS)
    store_rows(more, r_R * D, piece_R, total, d, D, BLOCK_D, ALIGN_SUMS)


@triton.jit
def _add_rows(total, sums, first_R, end_R, d, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """total + sums[first] + sums[first + 1] + ... in this order, for each run."""
    steps = tl.max(end_R - first_R, axis=0)
    for k in range(0, steps, 4):
        at = first_R + k
        one = load_rows(sums, at * D, at < end_R, d, D, BLOCK_D, ALIGN)
        two = load_rows(sums, (at + 1) * D, at + 1 < end_R, d, D, BLOCK_D, ALIGN)
        three = load_rows(sums, (at + 2) * D, at + 2 < end_R, d, D, BLOCK_D, ALIGN)
        four = load_rows(sums, (at + 3) * D, at + 3 < end_R, d, D, BLOCK_D, ALIGN)
        total += one
        total += two
        total += three
        total += four
    return total


@triton.jit
def _add_gradients(
    total,
    grad,
    places_N,
    factors_N,
    first_R,
    end_R,
    d,
    max_gradient,
    CLAMP: tl.constexpr,
    SCALED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """total + the gradients of the sorted occurrences from first to end, in this order, for each run."""
    steps = tl.max(end_R - first_R, axis=0)
    for k in range(0, steps, 2):
        at = first_R + k
        one = _gradient(grad, places_N, factors_N, at, at < end_R, d, max_gradient, CLAMP, SCALED, D, BLOCK_D, ALIGN)
        two = _gradient(
            grad, places_N, factors_N, at + 1, at + 1 < end_R, d, max_gradient, CLAMP, SCALED, D, BLOCK_D, ALIGN
        )
        total += one
        total += two
    return total


@triton.jit
def mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _random_bits(step_key, table_R, row_R, d):
    """(R, BLOCK_D) uint32: kernels.ops.random_bits of these rows."""
    key_R = mix64(step_key.to(tl.uint64) + table_R.to(tl.uint64) * 0x9E3779B97F4A7C15)
    key_R = mix64(key_R ^ row_R.to(tl.uint64))
    x = key_R.to(tl.uint32)[:, None] + (d.to(tl.uint32) * 0x9E3779B9)[None, :]
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round_at_random(rows, bits, HALF: tl.constexpr):
    """float32 that bfloat16 (HALF: float16) holds exactly, as reference.round_at_random has it."""
    drop: tl.constexpr = 0x1FFF if HALF else 0xFFFF
    keep: tl.constexpr = 0xFFFFE000 if HALF else 0xFFFF0000
    raw = (rows.to(tl.uint32, bitcast=True) + (bits & drop)) & keep
    rounded = raw.to(tl.float32, bitcast=True)
    size = tl.abs(rows)
    if HALF:
        fraction = (bits & 0x1FFF).to(tl.int32).to(tl.float32) * 0.0001220703125  # 2**-13
        grid = tl.floor(size * 16777216.0 + fraction) * 5.9604644775390625e-08  # 2**24, 2**-24
        grid = tl.where(rows < 0, -grid, grid)
        rounded = tl.where(size < 6.103515625e-05, grid, rounded)  # 2**-14
    return tl.where(size < float("inf"), rounded, rows)


@triton.jit(do_not_specialize=["width", "tables", "step_key"])
def update(
    weights,  # flat, every table, updated in place; so are the states
    momentum1,  # flat float32; any tensor where the optimizer has none
    momentum2,
    keys_N,  # sorted, as are places and factors
    places_N,
    factors_N,
    grad,
    sums,
    more,
    firsts_N,
    bounds_W,
    bases_T,  # int64, of the tables of this width: the key of the first row
    starts_T,  # int64: where it is in weights
    row_starts_T,  # int64: where it is in a state of one float per row
    numbers_T,  # int64: the table's number in the spec
    width,  # which of the widths this is
    tables,
    step_key,  # int64
    lr,
    eps,
    beta1,
    beta2,
    rest1,  # 1 - beta1
    rest2,
    correction1,  # 1 - beta1 ** step
    correction2,
    weight_decay,
    keep,  # 1 - lr * weight_decay for decoupled decay, else 1
    max_gradient,
    max_norm,
    KIND: tl.constexpr,
    L2: tl.constexpr,
    CLAMP: tl.constexpr,
    NORM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCALED: tl.constexpr,
    FOLDED: tl.constexpr,  # whether there are enough ids for a piece: sums has been written
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_STATE: tl.constexpr,
    ALIGN_GRAD: tl.constexpr,
    ALIGN_SUMS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    first_run = tl.load(bounds_W + width)
    end_run = tl.load(bounds_W + width + 1)
    for tile in range(tl.program_id(0), tl.cdiv(end_run - first_run, ROWS), tl.num_programs(0)):
        r_R = first_run + tile * ROWS + tl.arange(0, ROWS)
        here = r_R < end_run
        first_R = tl.load(firsts_N + r_R, mask=here, other=0).to(tl.int64)
        end_R = tl.load(firsts_N + r_R + 1, mask=here, other=0).to(tl.int64)
        key_R = tl.load(keys_N + first_R, mask=here, other=0).to(tl.int64)

        # The last table whose base is not above the key.
        t_R = tl.zeros((ROWS,), dtype=tl.int32)
        end_t = t_R + tables
        span = tables
        while span > 1:
            middle = (t_R + end_t) // 2
            above = tl.load(bases_T + middle) > key_R
            end_t = tl.where(above, middle, end_t)
            t_R = tl.where(above, t_R, middle)
            span = (span + 1) // 2
        row_R = key_R - tl.load(bases_T + t_R, mask=here, other=0)
        start_R = tl.load(starts_T + t_R, mask=here, other=0)
        at_R = start_R + row_R * D
        state_R = tl.load(row_starts_T + t_R, mask=here, other=0) + row_R

        # The row and its states are on their way from memory while the gradients are added up.
        w = load_rows(weights, at_R, here, d, D, BLOCK_D, ALIGN)
        if (KIND == "adagrad" or KIND == "adam") or KIND == "rowwise_adam":
            first = load_rows(momentum1, at_R, here, d, D, BLOCK_D, ALIGN_STATE)
        if KIND == "rowwise_adagrad":
            first_row = tl.load(momentum1 + state_R, mask=here, other=0.0)
        if KIND == "adam":
            second = load_rows(momentum2, at_R, here, d, D, BLOCK_D, ALIGN_STATE)
        if KIND == "rowwise_adam":
            second_row = tl.load(momentum2 + state_R, mask=here, other=0.0)

        g = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
        if FOLDED:
            piece_R = (first_R + PIECE - 1) // PIECE
            end_piece_R = end_R // PIECE
            split = piece_R < end_piece_R
            big_R = (piece_R + PIECES - 1) // PIECES
            end_big_R = end_piece_R // PIECES
            nested = split & (big_R < end_big_R)
            stop_R = tl.where(split, piece_R * PIECE, end_R)
            g = _add_gradients(
                g, grad, places_N, factors_N, first_R, stop_R, d, max_gradient, CLAMP, SCALED, D, BLOCK_D, ALIGN_GRAD
            )
            if tl.max(split.to(tl.int32), axis=0) > 0:
                end_piece_R = tl.where(split, end_piece_R, piece_R)
                stop_R = tl.where(nested, big_R * PIECES, end_piece_R)
                g = _add_rows(g, sums, piece_R, stop_R, d, D, BLOCK_D, ALIGN_SUMS)
                g = _add_rows(g, more, big_R, tl.where(nested, end_big_R, big_R), d, D, BLOCK_D, ALIGN_SUMS)
                next_R = tl.where(nested, end_big_R * PIECES, end_piece_R)
                g = _add_rows(g, sums, next_R, end_piece_R, d, D, BLOCK_D, ALIGN_SUMS)
                next_R = tl.where(split, end_piece_R * PIECE, end_R)
                g = _add_gradients(
                    g, grad, places_N, factors_N, next_R, end_R, d, max_gradient, CLAMP, SCALED, D, BLOCK_D, ALIGN_GRAD
                )
        else:
            g = _add_gradients(
                g, grad, places_N, factors_N, first_R, end_R, d, max_gradient, CLAMP, SCALED, D, BLOCK_D, ALIGN_GRAD
            )

        if L2:
            g += weight_decay * w
        if KIND == "sgd":
            w = w - lr * g
        elif KIND == "adagrad":
            first += g * g
            store_rows(momentum1, at_R, here, first, d, D, BLOCK_D, ALIGN_STATE)
            w = w - lr * g / (tl.sqrt(first) + eps)
        elif KIND == "rowwise_adagrad":
            first_row += tl.sum(g * g, axis=1) / D
            tl.store(momentum1 + state_R, first_row, mask=here)
            w = keep * w - (lr / (tl.sqrt(first_row) + eps))[:, None] * g
        else:
            first = beta1 * first + rest1 * g
            store_rows(momentum1, at_R, here, first, d, D, BLOCK_D, ALIGN_STATE)
            if KIND == "adam":
                second = beta2 * second + rest2 * g * g
                store_rows(momentum2, at_R, here, second, d, D, BLOCK_D, ALIGN_STATE)
                root = tl.sqrt(second / correction2) + eps
            else:
                second_row = beta2 * second_row + rest2 * (tl.sum(g * g, axis=1) / D)
                tl.store(momentum2 + state_R, second_row, mask=here)
                root = (tl.sqrt(second_row / correction2) + eps)[:, None]
            w = keep * w - lr * (first / correction1) / root
        if NORM:
            norm_R = tl.sqrt(tl.sum(w * w, axis=1))
            w = w * tl.where(norm_R > max_norm, max_norm / norm_R, 1.0)[:, None]
        if STOCHASTIC:
            table_R = tl.load(numbers_T + t_R, mask=here, other=0)
            bits = _random_bits(step_key, table_R, row_R, d)
            w = _round_at_random(w, bits, weights.dtype.element_ty == tl.float16)
        store_rows(weights, at_R, here, w, d, D, BLOCK_D, ALIGN)
