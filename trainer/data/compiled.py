"""Numba loops over columns: what the reader does to every value, without Python's lock, a row group or batch a call.

Columns are handed over as addresses, so that one call serves all of them; the caller keeps the arrays alive meanwhile.
Indices are unsigned: signed ones cost a test for negative ones at every element, which makes these loops 2 to 3 times
slower.  The first call ever compiles (some seconds; `ready` does all of it), later processes read Numba's cache, which
is beside this file, or under NUMBA_CACHE_DIR, or nowhere where no folder can be written to.

Letters in shapes: n rows of a block, P pieces of row groups that it is made of, C runs of its places that are rows of
one batch, B rows of a batch, F features, G those with one id or none per row, H the multi-hot ones, J groups of
columns, M columns of numbers, S runs of rows, N ids.  A word is 4 bytes, or 8 for ids of wide tables.
"""

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels._njit import njit

u64 = np.uint64
IN_ORDER = np.empty(0, np.uint32)  # the index that leaves everything where it is
AHEAD = u64(24)  # records on their way into the cache while one is copied

# Columns of run_C.  A run is places of a block that are rows of one batch:
FIRST, ROWS = 0, 1  # its first place, how many
IDS, DENSE, LABELS, WEIGHT, ROW = 2, 3, 4, 5, 6  # addresses in the batch of its first row's: id of feature 0, ...


@intrinsic
def _pointer(typing_context, address, word):
    """address: uint64 -> a pointer to words of the type of `word`, whose value does not matter."""
    pointer = types.CPointer(word)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, word), generate


@njit
def highest(column_C, rows, mask, out_C):
    """The highest `word & mask` of each column, as unsigned words of the type of `mask`; 0 of no rows.

    Ids: no mask.  A negative one counts as above every table, so one pass finds both ends.
    Numbers: the mask takes the sign off; above 0x7F7FFFFF are infinity and the NaNs.
    """
    for c in range(u64(len(column_C))):
        words = carray(_pointer(column_C[c], mask), (rows,))
        found = mask ^ mask
        for i in range(rows):
            found = max(found, words[i] & mask)
        out_C[c] = found


def _vector_move(lanes, element, store_alignment, nontemporal=False, shifted=False):
    """An intrinsic that moves one vector from an address to another, on the way shifted left, then right with sign."""
    vector = ir.VectorType(element, lanes)
    pointer = vector.as_pointer()

    def move(builder, source, target, left=None, right=None):
        value = builder.load(builder.inttoptr(source, pointer), align=4)
        if shifted:
            value = builder.shl(value, _splat(builder, vector, left))
            value = builder.ashr(value, _splat(builder, vector, right))
        store = builder.store(value, builder.inttoptr(target, pointer), align=store_alignment)
        if nontemporal:
            store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))

    if shifted:

        @intrinsic
        def moved(typing_context, source, target, left, right):
            return types.void(source, target, left, right), lambda context, builder, _, args: _none(
                context, move(builder, *args)
            )
    else:

        @intrinsic
        def moved(typing_context, source, target):
            return types.void(source, target), lambda context, builder, _, args: _none(context, move(builder, *args))

    return moved


def _none(context, _):
    return context.get_dummy_value()


def _splat(builder, vector, scalar):
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), lanes)


# Eight ids from the cache to memory, past the cache: what is written is read a good deal later, and the lines that it
# fills need not be read first.  The target must be at a multiple of 64.
_stream_ids = _vector_move(8, ir.IntType(64), 64, nontemporal=True, shifted=True)
_copy_16_floats = _vector_move(16, ir.FloatType(), 4)


@intrinsic
def _turn_16(typing_context, column_16, offset, target, stride):
    """16 columns of float32 from `offset` bytes on -> 16 rows of 16 floats at `target` and every `stride` bytes on.

    column_16: pointer to the columns' addresses.  target, stride: multiples of 64.
    Done in registers, in four rounds: round s swaps bit s of the row's number with bit s of the column's.
    """
    word, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), 16)

    def generate(context, builder, signature, arguments):
        column_16, offset, target, stride = arguments
        columns = builder.inttoptr(column_16, word.as_pointer())
        rows = []
        for k in range(16):
            address = builder.add(builder.load(builder.gep(columns, [ir.Constant(ir.IntType(32), k)])), offset)
            rows.append(builder.load(builder.inttoptr(address, vector.as_pointer()), align=4))
        for s in (8, 4, 2, 1):
            for i in (i for i in range(16) if not i & s):
                a, b = rows[i], rows[i | s]
                low = [16 + (k ^ s) if k & s else k for k in range(16)]
                high = [16 + k if k & s else k | s for k in range(16)]
                rows[i], rows[i | s] = (
                    builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), 16), take))
                    for take in (low, high)
                )
        for row in rows:
            builder.store(row, builder.inttoptr(target, vector.as_pointer()), align=64)
            target = builder.add(target, stride)
        return context.get_dummy_value()

    return types.void(column_16, offset, target, stride), generate


@intrinsic
def _prefetch(typing_context, address):
    """Have the line at an address on its way into the cache."""

    def generate(context, builder, signature, arguments):
        word, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        place = builder.inttoptr(arguments[0], pointer)
        builder.call(function, [place, *(ir.Constant(word, k) for k in (0, 3, 1))])  # for reading, to keep, data
        return context.get_dummy_value()

    return types.void(address), generate


@intrinsic
def _fence(typing_context):
    """What was streamed is there for other threads from here on."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@njit
def fill_ids(column_PG, rows_P, index_n, run_C, stride, lanes_J, column_J4, word, word_n, part_64):
    """The ids of a block to their places in batches, widened to 64 bits.

    column_PG: addresses of the G columns of ids of the P pieces that make up the block; rows_P: their rows.
    index_n: the place i of the block takes row index[i]; empty: row i.
    run_C: `Runs` of places of the block, which are rows of batches; stride: bytes from one feature to the next there.
    lanes_J, column_J4: which columns go together: 1, 2 or 4 at a time, the last one again where there are fewer.
    word: int32 or int64, what ids come as.
    word_n: scratch, a row's ids of one group side by side in 64 bits.  Filling it reads columns in order, which is
        fast, and leaves it in the cache; so random reads are of the cache, and one of them serves 2 columns, or 4 of
        ids below 2**15.  Rows of all columns side by side take too much cache.
    part_64: scratch of 64 words at a multiple of 64 bytes.
    """
    one, four, eight, sixty_four = u64(1), u64(4), u64(8), u64(64)
    part = part_64.ctypes.data
    for j in range(u64(len(lanes_J))):
        lanes = lanes_J[j]
        bits = sixty_four // lanes
        at = u64(0)
        for p in range(u64(len(rows_P))):
            rows = rows_P[p]
            a = carray(_pointer(column_PG[p, column_J4[j, u64(0)]], word), (rows,))
            b = carray(_pointer(column_PG[p, column_J4[j, u64(1)]], word), (rows,))
            if lanes == one:
                for i in range(rows):
                    word_n[at + i] = u64(a[i])
            elif lanes == four:
                c = carray(_pointer(column_PG[p, column_J4[j, u64(2)]], word), (rows,))
                d = carray(_pointer(column_PG[p, column_J4[j, u64(3)]], word), (rows,))
                mask = u64(0xFFFF)
                for i in range(rows):
                    low = u64(a[i]) & mask | (u64(b[i]) & mask) << u64(16)
                    word_n[at + i] = low | (u64(c[i]) & mask) << u64(32) | u64(d[i]) << u64(48)
            else:
                for i in range(rows):
                    word_n[at + i] = u64(a[i]) & u64(0xFFFFFFFF) | u64(b[i]) << u64(32)
            at += rows
        for r in range(u64(len(run_C))):
            first, rows = run_C[r, FIRST], run_C[r, ROWS]
            start = run_C[r, IDS]
            done = u64(0)
            while done < rows:
                count = min(sixty_four, rows - done)
                if count == sixty_four and (start + done * eight) % sixty_four:
                    count = (sixty_four - (start + done * eight) % sixty_four) // eight
                if len(index_n):
                    for i in range(count):
                        part_64[i] = word_n[index_n[first + done + i]]
                else:
                    for i in range(count):
                        part_64[i] = word_n[first + done + i]
                for lane in range(lanes):
                    if lane and column_J4[j, lane] == column_J4[j, lane - one]:
                        continue
                    to = start + column_J4[j, lane] * stride + done * eight
                    left, right = sixty_four - bits * (lane + one), sixty_four - bits
                    if count == sixty_four and stride % sixty_four == u64(0):
                        for i in range(u64(0), sixty_four, eight):
                            _stream_ids(u64(part) + i * eight, to + i * eight, left, right)
                    else:
                        out = carray(_pointer(to, np.int64(0)), (count,))
                        for i in range(count):
                            out[i] = np.int64(part_64[i] << left) >> np.int64(right)
                done += count
    _fence()


@njit
def fill_rows(column_PM, rows_P, first_P, index_n, run_C, dense, labels, record_n, number_n):
    """Everything of a block but the ids, to its places in batches.

    column_PM: addresses of the pieces' columns of numbers: dense inputs, labels, the weight where there is one.
    first_P: number of each piece's first row.
    record_n, number_n: scratch.  A row's numbers stand together in record_n, as many to a row as are a multiple of 16,
        with a row to spare.
    """
    columns, zero = u64(column_PM.shape[1]), u64(0)
    width = (columns + u64(15)) // u64(16) * u64(16)
    weighted = columns > dense + labels
    records = u64(record_n.ctypes.data)
    sixteen, begin = u64(16), zero
    column_16 = np.empty(16, np.uint64)
    for p in range(u64(len(rows_P))):
        rows = rows_P[p]
        for m in range(zero, columns, sixteen):
            for k in range(sixteen):  # where there are no 16 columns left, the last one again
                column_16[k] = column_PM[p, min(m + k, columns - u64(1))]
            whole = rows // sixteen * sixteen
            for i in range(zero, whole, sixteen):
                target = records + ((begin + i) * width + m) * u64(4)
                _turn_16(u64(column_16.ctypes.data), i * u64(4), target, width * u64(4))
            for k in range(min(sixteen, columns - m)):
                given = carray(_pointer(column_16[k], np.float32(0)), (rows,))
                for i in range(whole, rows):
                    record_n[(begin + i) * width + m + k] = given[i]
        for i in range(rows):
            number_n[begin + i] = first_P[p] + i
        begin += rows
    last = u64(len(index_n)) - u64(1)
    for r in range(u64(len(run_C))):
        first, rows = run_C[r, FIRST], run_C[r, ROWS]
        dense_BK = carray(_pointer(run_C[r, DENSE], np.float32(0)), (rows * dense,))
        label_BT = carray(_pointer(run_C[r, LABELS], np.float32(0)), (rows * labels,))
        weight_B = carray(_pointer(run_C[r, WEIGHT], np.float32(0)), (rows,))
        row_B = carray(_pointer(run_C[r, ROW], np.int64(0)), (rows,))
        whole = (dense + u64(15)) // u64(16) * u64(16)  # floats that are moved, the last few over the next row's
        for i in range(rows):
            if len(index_n):
                at = u64(index_n[first + i])
                _prefetch(records + u64(index_n[min(first + i + AHEAD, last)]) * width * u64(4))
            else:
                at = first + i
            record = at * width
            if i * dense + whole <= rows * dense:
                for k in range(zero, whole, u64(16)):
                    _copy_16_floats(records + (record + k) * u64(4), run_C[r, DENSE] + (i * dense + k) * u64(4))
            else:
                for k in range(dense):
                    dense_BK[i * dense + k] = record_n[record + k]
            for t in range(labels):
                label_BT[i * labels + t] = record_n[record + dense + t]
            weight_B[i] = record_n[record + dense + labels] if weighted else np.float32(1)
            row_B[i] = number_n[at]


@njit
def bijection(constants, bits, size, out):
    """A keyed permutation of range(size), size <= 2**31, into `out`.  constants: (10,) uint32, the key.

    Each of five rounds maps the k-bit integers one to one onto themselves: times an odd number, plus a constant, modulo
    2**k, then xor with its own upper half.  Values >= size are left out; what remains is a permutation of range(size).
    The rounds are written out, as the compiler vectorises that and not a loop of five.
    """
    mask, half = np.uint32((u64(1) << bits) - u64(1)), np.uint32((bits + u64(1)) >> u64(1))
    m0, m1, m2 = constants[0] | np.uint32(1), constants[2] | np.uint32(1), constants[4] | np.uint32(1)
    m3, m4 = constants[6] | np.uint32(1), constants[8] | np.uint32(1)
    a0, a1, a2, a3, a4 = constants[1], constants[3], constants[5], constants[7], constants[9]
    whole, found = size == u64(1) << bits, u64(0)
    for i in range(u64(1) << bits):
        x = np.uint32(np.uint32(i) * m0 + a0) & mask
        x ^= x >> half
        x = np.uint32(x * m1 + a1) & mask
        x ^= x >> half
        x = np.uint32(x * m2 + a2) & mask
        x ^= x >> half
        x = np.uint32(x * m3 + a3) & mask
        x ^= x >> half
        x = np.uint32(x * m4 + a4) & mask
        x ^= x >> half
        if whole:
            out[i] = x
        elif x < size:
            out[found] = x
            found += u64(1)


@njit
def take_bags(value_P, offset_P, rows_P, index_n, word, start_n, count_n, out_N, out_offset_n):
    """The bags of several pieces as one, in the order of `index_n` (empty: as they are).

    value_P, offset_P: addresses of the pieces' values and of the first of their rows' offsets (int64).
    start_n, count_n: scratch.
    Example: the bags [7 8] [] [9] are values 7 8 9, offsets 0 2 2 3.  Index 2 1 0 gives [9] [] [7 8]: values 9 7 8,
    offsets 0 1 1 3.
    """
    at = u64(0)
    for p in range(u64(len(rows_P))):
        offset = carray(_pointer(offset_P[p], np.int64(0)), (rows_P[p],))
        for i in range(rows_P[p]):
            start_n[at + i] = value_P[p] + u64(offset[i]) * u64(out_N.itemsize)
            count_n[at + i] = offset[i + u64(1)] - offset[i]
        at += rows_P[p]
    end = u64(0)
    out_offset_n[u64(0)] = 0
    for i in range(at):
        bag = u64(index_n[i]) if len(index_n) else i
        count = u64(count_n[bag])
        given = carray(_pointer(start_n[bag], word), (count,))
        for j in range(count):
            out_N[end + j] = given[j]
        end += count
        out_offset_n[i + u64(1)] = end


@njit
def bag_lengths(column_F, multi_hot_F, id_GB, hole_G, none_G, at_S, rows_S, offset_SH, length_FB, ids_F):
    """How many ids each bag of a batch holds, and each feature in all.

    column_F: a feature's place among those with one id or none per row, or among the multi-hot ones.
    hole_G: whether there may be rows without an id; none_G: what stands there.
    at_S, rows_S: the runs of rows that multi-hot features are in; offset_SH: addresses of the offsets (int64) of their
        first bags.  Rows in none have empty bags.
    """
    for f in range(u64(len(column_F))):
        ids = u64(0)
        if multi_hot_F[f]:
            for i in range(u64(length_FB.shape[1])):
                length_FB[f, i] = 0
            for s in range(u64(len(at_S))):
                at, rows = at_S[s], rows_S[s]
                offset = carray(_pointer(offset_SH[s, column_F[f]], np.int64(0)), (rows,))
                for i in range(rows):
                    length_FB[f, at + i] = offset[i + u64(1)] - offset[i]
                ids += u64(offset[rows] - offset[u64(0)])
        elif hole_G[column_F[f]]:
            for i in range(u64(length_FB.shape[1])):
                there = id_GB[column_F[f], i] != none_G[column_F[f]]
                length_FB[f, i] = there
                ids += u64(there)
        else:
            ids = u64(length_FB.shape[1])
            for i in range(ids):
                length_FB[f, i] = 1
        ids_F[f] = ids


@njit
def fill_bags(column_F, multi_hot_F, id_GB, hole_G, none_G, rows_S, offset_SH, value_SH, word, out_N):
    """The ids of a batch, feature by feature; the lengths come from `bag_lengths`.  out_N has one element to spare.

    value_SH: addresses of the values (words) that the offsets count.
    """
    end = u64(0)
    for f in range(u64(len(column_F))):
        column = column_F[f]
        if multi_hot_F[f]:
            for s in range(u64(len(rows_S))):
                rows = rows_S[s]
                offset = carray(_pointer(offset_SH[s, column], np.int64(0)), (rows,))
                first = u64(offset[u64(0)])
                given = carray(_pointer(value_SH[s, column], word), (rows,))
                ids = u64(offset[rows]) - first
                for i in range(ids):
                    out_N[end + i] = given[first + i]
                end += ids
        elif hole_G[column]:
            for i in range(u64(id_GB.shape[1])):
                out_N[end] = id_GB[column, i]
                end += u64(id_GB[column, i] != none_G[column])
        else:
            for i in range(u64(id_GB.shape[1])):
                out_N[end + i] = id_GB[column, i]
            end += u64(id_GB.shape[1])


def _signatures() -> dict[Callable, list[tuple]]:
    u, u4, i4, i8, f4, flag = types.uint64, types.uint32, types.int32, types.int64, types.float32, types.boolean
    vector, matrix = (lambda kind: types.Array(kind, 1, "C")), (lambda kind: types.Array(kind, 2, "C"))
    us, uss, index, flags = vector(u), matrix(u), vector(u4), vector(flag)
    words = (i4, i8)
    return {
        highest: [(us, u, unsigned, vector(unsigned)) for unsigned in (u4, u)],
        fill_ids: [(uss, us, index, uss, u, us, uss, word, us, us) for word in words],
        fill_rows: [(uss, us, us, index, uss, u, u, vector(f4), vector(i8))],
        bijection: [(index, u, u, index)],
        take_bags: [(us, us, us, index, word, us, vector(i8), vector(word), vector(i8)) for word in words],
        bag_lengths: [(us, flags, matrix(i8), flags, vector(i8), us, us, uss, matrix(i4), us)],
        fill_bags: [(us, flags, matrix(i8), flags, vector(i8), us, uss, uss, word, vector(i8)) for word in words],
    }


def ready() -> None:
    """Compile everything, or read it from the cache, now instead of inside the first batch."""
    for kernel, found in _signatures().items():
        for signature in found:
            kernel.compile(signature)
