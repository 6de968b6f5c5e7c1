"""Numba loops over columns: what the reader does to every value, without Python's lock, a row group or batch a call.

Columns are handed over as addresses, so that one call serves all of them; the caller keeps the arrays alive meanwhile.
Indices are unsigned: signed ones cost a test for negative ones at every element, which makes these loops 2 to 3 times
slower.  The first call ever compiles (some seconds; `ready` does all of it), later processes read Numba's cache, which
is beside this file, or under NUMBA_CACHE_DIR, or nowhere where no folder can be written to.

Letters in shapes: n rows of a block, B rows of a batch, C columns, F features, H multi-hot features, S slices, K dense
inputs, T labels, N ids.  A word is 4 bytes, or 8 for ids of wide tables.
"""

from collections.abc import Callable, Iterable

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

u64 = np.uint64
NOTHING = np.empty(0, np.uint32)  # for `gather`: no index, no place
TILE = u64(32)  # rows whose dense inputs are turned at once: 13 columns of them fit the CPU's first cache

# What the kernels below that fill batches know of a slice of a block, as columns of slice_S:
AT = 0  # place of its first row in the batch
ROWS = 1
IDS, IDS_STRIDE = 2, 3  # address of its first id, bytes from one feature to the next
NUMBERS, NUMBERS_STRIDE = 4, 5  # address of its first number, floats from one column to the next
ROW = 6  # address of its first row number


def addresses(columns: Iterable[np.ndarray]) -> np.ndarray:
    """(C,) uint64: where each column begins.  Each has one dimension and no gaps."""
    return np.array([column.__array_interface__["data"][0] for column in columns], np.uint64)


def _kernel(function: Callable) -> Callable:
    try:
        return njit(function, nogil=True, error_model="numpy", cache=True)
    except RuntimeError:  # no folder for the cache can be written to
        return njit(function, nogil=True, error_model="numpy")


@intrinsic
def _pointer(typing_context, address, word):
    """address: uint64 -> a pointer to words of the type of `word`, whose value does not matter."""
    pointer = types.CPointer(word)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, word), generate


@_kernel
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


@_kernel
def gather(from_C, to_C, rows, index_n, place_n, pair_n):
    """Move `rows` 4-byte words of every column: to[place_n[i]] = from[index_n[i]]; empty index or place: i itself.

    Two columns at a time are laid side by side in pair_n (`rows` words of 8 bytes, scratch): that reads them in order,
    which is fast, and into the cache, and half as many reads then go all over the place.
    Example: from 5 6 7, index 2 0, place 0 3: to[0] = 7, to[3] = 5.
    """
    word, half = np.uint32(0), u64(32)
    last = u64(len(from_C) - 1)
    for c in range(u64(0), u64(len(from_C)), u64(2)):
        other = min(c + u64(1), last)  # of an odd number, the last goes with itself
        from_1, from_2 = carray(_pointer(from_C[c], word), (rows,)), carray(_pointer(from_C[other], word), (rows,))
        to_1, to_2 = carray(_pointer(to_C[c], word), (rows,)), carray(_pointer(to_C[other], word), (rows,))
        if len(index_n) == 0:
            for i in range(rows):
                to_1[i] = from_1[i]
            for i in range(rows):
                to_2[i] = from_2[i]
            continue
        for i in range(rows):
            pair_n[i] = u64(from_1[i]) | u64(from_2[i]) << half
        if len(place_n) == 0:
            for i in range(rows):
                pair = pair_n[index_n[i]]
                to_1[i] = np.uint32(pair)
                to_2[i] = np.uint32(pair >> half)
        else:
            for i in range(rows):
                pair, place = pair_n[index_n[i]], place_n[i]
                to_1[place] = np.uint32(pair)
                to_2[place] = np.uint32(pair >> half)


@_kernel
def gather_wide(from_C, to_C, rows, index_n, place_n):
    """`gather` of words of 8 bytes."""
    word = u64(0)
    for c in range(u64(len(from_C))):
        given, out = carray(_pointer(from_C[c], word), (rows,)), carray(_pointer(to_C[c], word), (rows,))
        for i in range(rows):
            out[place_n[i] if len(place_n) else i] = given[index_n[i] if len(index_n) else i]


@_kernel
def number_rows(row_n, at, rows, first, index_n, place_n):
    """The same move for the row numbers first, first+1, ...; without an index they go to `at` and after it."""
    for i in range(rows):
        if len(index_n) == 0:
            row_n[at + i] = first + i
        elif len(place_n) == 0:
            row_n[i] = first + index_n[i]
        else:
            row_n[place_n[i]] = first + index_n[i]


@_kernel
def pick(index_n, low, high, place_n, source_n):
    """Where the rows low .. high-1 of what `index_n` permutes end up, in rising order; source_n: counted from low.

    Example: index 2 0 3 1, rows 2 and 3: places 0 2, sources 0 1.  Both results need one element to spare.
    """
    found = u64(0)
    for i in range(u64(len(index_n))):
        place_n[found] = i
        source_n[found] = index_n[i] - low
        found += u64((index_n[i] >= low) & (index_n[i] < high))


@_kernel
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


@_kernel
def take_bags(values, offset_n, index_n, word, out_N, out_offset_n):
    """The bags in the order of `index_n`.  values: the address of the words that the offsets count.

    Example: the bags [7 8] [] [9] are values 7 8 9, offsets 0 2 2 3.  Index 2 1 0 gives [9] [] [7 8]: values 9 7 8,
    offsets 0 1 1 3.
    """
    given = carray(_pointer(values, word), (u64(1),))
    end = u64(0)
    out_offset_n[u64(0)] = 0
    for i in range(u64(len(index_n))):
        bag = u64(index_n[i])
        for j in range(u64(offset_n[bag]), u64(offset_n[bag + u64(1)])):
            out_N[end] = given[j]
            end += u64(1)
        out_offset_n[i + u64(1)] = end


@_kernel
def fill_rows(slice_S, dense_BK, label_BT, weight_B, row_B, weighted):
    """Everything of a batch but the ids, out of slices of blocks; see `trainer.data.assemble.build`."""
    dense, labels = u64(dense_BK.shape[1]), u64(label_BT.shape[1])
    for s in range(u64(len(slice_S))):
        at, rows, stride = slice_S[s, AT], slice_S[s, ROWS], slice_S[s, NUMBERS_STRIDE]
        number = carray(_pointer(slice_S[s, NUMBERS], np.float32(0)), (rows,))
        row = carray(_pointer(slice_S[s, ROW], np.int64(0)), (rows,))
        for first in range(u64(0), rows, TILE):
            for k in range(dense):
                for i in range(first, min(first + TILE, rows)):
                    dense_BK[at + i, k] = number[k * stride + i]
        for t in range(labels):
            for i in range(rows):
                label_BT[at + i, t] = number[(dense + t) * stride + i]
        for i in range(rows):
            weight_B[at + i] = number[(dense + labels) * stride + i] if weighted else np.float32(1)
        for i in range(rows):
            row_B[at + i] = row[i]


@_kernel
def fill_ids(slice_S, word, id_FB):
    """The ids of a batch whose every bag holds one, widened to 64 bits.  word: int32 or int64."""
    for f in range(u64(id_FB.shape[0])):
        for s in range(u64(len(slice_S))):
            at, rows = slice_S[s, AT], slice_S[s, ROWS]
            given = carray(_pointer(slice_S[s, IDS] + f * slice_S[s, IDS_STRIDE], word), (rows,))
            for i in range(rows):
                id_FB[f, at + i] = given[i]


@_kernel
def bag_lengths(slice_S, word, column_F, multi_hot_F, offset_SH, length_FB, ids_F):
    """How many ids each bag of a batch holds, and each feature in all.

    column_F: a feature's place among those with one id or none per row, or among the multi-hot ones.
    offset_SH: addresses of the offsets (int64) of the slice's first bag.
    """
    for f in range(u64(len(column_F))):
        ids = u64(0)
        for s in range(u64(len(slice_S))):
            at, rows = slice_S[s, AT], slice_S[s, ROWS]
            if multi_hot_F[f]:
                offset = carray(_pointer(offset_SH[s, column_F[f]], np.int64(0)), (rows,))
                for i in range(rows):
                    length_FB[f, at + i] = offset[i + u64(1)] - offset[i]
                ids += u64(offset[rows] - offset[u64(0)])
            else:
                given = carray(_pointer(slice_S[s, IDS] + column_F[f] * slice_S[s, IDS_STRIDE], word), (rows,))
                there = u64(0)
                for i in range(rows):
                    length_FB[f, at + i] = given[i] >= 0
                    there += u64(given[i] >= 0)
                ids += there
        ids_F[f] = ids


@_kernel
def fill_bags(slice_S, word, column_F, multi_hot_F, offset_SH, value_SH, out_N):
    """The ids of a batch, feature by feature; the lengths come from `bag_lengths`.  out_N has one element to spare.

    value_SH: addresses of the values that the offsets count.
    """
    end = u64(0)
    for f in range(u64(len(column_F))):
        for s in range(u64(len(slice_S))):
            rows = slice_S[s, ROWS]
            if multi_hot_F[f]:
                offset = carray(_pointer(offset_SH[s, column_F[f]], np.int64(0)), (rows,))
                first = u64(offset[u64(0)])
                given = carray(_pointer(value_SH[s, column_F[f]], word), (rows,))
                ids = u64(offset[rows]) - first
                for i in range(ids):
                    out_N[end + i] = given[first + i]
                end += ids
            else:
                given = carray(_pointer(slice_S[s, IDS] + column_F[f] * slice_S[s, IDS_STRIDE], word), (rows,))
                for i in range(rows):
                    out_N[end] = given[i]
                    end += u64(given[i] >= 0)


def _signatures() -> dict[Callable, list[tuple]]:
    u, u4, i4, i8, f4, flag = types.uint64, types.uint32, types.int32, types.int64, types.float32, types.boolean
    vector, matrix = (lambda kind: types.Array(kind, 1, "C")), (lambda kind: types.Array(kind, 2, "C"))
    places, slices = (vector(u4), vector(u4)), matrix(u)
    of_word = [(u4, i4), (u, i8)]
    return {
        highest: [(vector(u), u, unsigned, vector(unsigned)) for unsigned, _ in of_word],
        gather: [(vector(u), vector(u), u, *places, vector(u))],
        gather_wide: [(vector(u), vector(u), u, *places)],
        number_rows: [(vector(i8), u, u, u, *places)],
        pick: [(vector(u4), u, u, *places)],
        bijection: [(vector(u4), u, u, vector(u4))],
        take_bags: [(u, vector(i8), vector(u4), signed, vector(signed), vector(i8)) for _, signed in of_word],
        fill_rows: [(slices, matrix(f4), matrix(f4), vector(f4), vector(i8), flag)],
        fill_ids: [(slices, signed, matrix(i8)) for _, signed in of_word],
        bag_lengths: [(slices, s, vector(u), vector(flag), slices, matrix(i4), vector(u)) for _, s in of_word],
        fill_bags: [(slices, s, vector(u), vector(flag), slices, slices, vector(i8)) for _, s in of_word],
    }


def ready() -> None:
    """Compile everything, or read it from the cache, now instead of inside the first batch."""
    for kernel, found in _signatures().items():
        for signature in found:
            kernel.compile(signature)
