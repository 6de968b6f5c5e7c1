"""Values -> ids, without a Python step per row.

Every value first becomes a 64-bit key: an integer is its own key (two's complement), hexadecimal text the number it
writes, other text a 64-bit hash of its bytes.  A vocabulary maps keys to ids by counted frequency, a hash maps a key
to 1 + mix(key ^ mix(seed)) % (rows - 1); both keep id 0 for what is missing or unseen.

Two different texts share a key with probability 2**-64: for 10 million distinct values in a column the chance that any
two are taken for one is below 3 in a million.  In return a vocabulary costs at most 40 bytes a distinct value, however
long the text is.

Letters in names: N values, V distinct keys.
"""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio; splitmix64's increment
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's multipliers

_HEX = np.full(256, 255, np.uint8)
for _digit, _char in enumerate(b"0123456789abcdef"):
    _HEX[_char] = _digit
    _HEX[bytes([_char]).upper()[0]] = _digit


def mix64(x: np.ndarray | int) -> np.ndarray:
    """splitmix64 of each uint64: a bijection, every output bit depending on all of the input.

    mix64(0) = 0xe220a8397b1dcdaf.
    """
    with np.errstate(over="ignore"):
        z = np.asarray(x, np.uint64) + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        return z ^ (z >> np.uint64(31))


def unmix64(mixed: np.ndarray) -> np.ndarray:
    """The inverse of `mix64`."""
    with np.errstate(over="ignore"):
        z = mixed ^ (mixed >> np.uint64(31)) ^ (mixed >> np.uint64(62))
        z = z * np.uint64(pow(int(_MIX_2), -1, 2**64))
        z = z ^ (z >> np.uint64(27)) ^ (z >> np.uint64(54))
        z = z * np.uint64(pow(int(_MIX_1), -1, 2**64))
        z = z ^ (z >> np.uint64(30)) ^ (z >> np.uint64(60))
        return z - _GOLDEN


def hash_keys(keys_N: np.ndarray, *, rows: int, seed: int) -> np.ndarray:
    """uint64 keys -> ids 1 .. rows-1.  rows = 2 sends everything to id 1."""
    mixed_N = mix64(keys_N ^ mix64(seed))
    return (mixed_N % np.uint64(rows - 1)).astype(np.int64) + 1


def keys_of(values: pa.Array, *, hex: bool = False) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """(keys uint64 N, present bool N or None for all, malformed bool N or None for none) of integers or text.

    Where a value is missing or malformed the key is 0.
    """
    present_N = None if not values.null_count else np.asarray(pc.is_valid(values))
    if pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
        if values.type == pa.uint64():
            return np.asarray(values.fill_null(0)), present_N, None
        return np.asarray(values.cast(pa.int64()).fill_null(0)).view(np.uint64), present_N, None
    data, starts_N, lengths_N = _bytes(values)
    if not hex:
        keys_N = hash_bytes(data, starts_N, lengths_N)
        if present_N is not None:
            keys_N[~present_N] = 0
        return keys_N, present_N, None
    keys_N, good_N = _hex_keys(data, starts_N, lengths_N)
    bad_N = ~good_N if present_N is None else ~good_N & present_N
    return keys_N, present_N, (bad_N if bad_N.any() else None)


def hash_bytes(data: np.ndarray, starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """64-bit hash of each byte string data[start : start + length].

    h = mix(length); for every 8 bytes, little-endian, the last ones padded with zeros: h = mix(h ^ word).
    The loop runs over the words of the longest string; strings that have ended drop out of it.
    """
    hash_N = mix64(lengths_N.astype(np.uint64))
    if not len(lengths_N) or not lengths_N.max():
        return hash_N
    # A view of the word at every byte position; 8 bytes of padding keep the last ones inside the buffer.
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    words = np.ndarray(len(data) + 1, dtype="<u8", buffer=padded, strides=(1,))
    alive = np.flatnonzero(lengths_N)
    offset = 0
    while len(alive):
        left = lengths_N[alive] - offset
        word = words[starts_N[alive] + offset]
        short = left < 8
        if short.any():
            # (1 << 8 * left) - 1 keeps the low `left` bytes.
            keep = (np.uint64(1) << (np.minimum(left, 7) * 8).astype(np.uint64)) - np.uint64(1)
            word = np.where(short, word & keep, word)
        hash_N[alive] = mix64(hash_N[alive] ^ word)
        alive = alive[left > 8]
        offset += 8
    return hash_N


def _bytes(values: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(data uint8, starts int64 N, lengths int64 N) of a binary or string array, without a copy of the text."""
    if len(values) == 0:
        return np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64)
    wide = pa.types.is_large_binary(values.type) or pa.types.is_large_string(values.type)
    _, offsets, data = values.buffers()
    kind = np.int64 if wide else np.int32
    ends = np.frombuffer(offsets, kind)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    text = np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(0, np.uint8)
    # Only the part that this slice covers: a slice of a large array must not hash-pad all of it.
    first, last = ends[0], ends[-1]
    return text[first:last], ends[:-1] - first, np.diff(ends)


def _hex_keys(data: np.ndarray, starts_N: np.ndarray, lengths_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the numbers written, whether each is 1 to 16 hexadecimal digits)."""
    nibbles = _HEX[data]
    eight = lengths_N == 8
    if len(data) == 8 * np.count_nonzero(eight):
        # What Criteo has: 8 digits everywhere but where the value is missing.
        digits = nibbles.reshape(-1, 8)
        good = digits.max(axis=1, initial=0) < 16 if digits.max(initial=0) > 15 else np.ones(len(digits), bool)
        packed = (digits[:, 0::2] << 4) | (digits[:, 1::2] & 15)
        numbers = packed.view(">u4")[:, 0].astype(np.uint64)
        keys_N, good_N = np.zeros(len(lengths_N), np.uint64), np.zeros(len(lengths_N), bool)
        keys_N[eight], good_N[eight] = np.where(good, numbers, 0), good
        return keys_N, good_N
    good_N = (lengths_N >= 1) & (lengths_N <= 16)
    keys_N = np.zeros(len(lengths_N), np.uint64)
    for j in range(int(lengths_N[good_N].max(initial=0))):
        here = np.flatnonzero(good_N & (lengths_N > j))
        digit = nibbles[starts_N[here] + j]
        good_N[here] &= digit < 16
        keys_N[here] = (keys_N[here] << np.uint64(4)) | (digit & 15).astype(np.uint64)
    keys_N[~good_N] = 0
    return keys_N, good_N


def count(keys_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct keys, how often each occurs), in no particular order."""
    counted = pc.value_counts(pa.array(keys_N))
    return np.asarray(counted.field(0)), np.asarray(counted.field(1))


class Counter:
    """How often each key was seen.  Threads may add at once; the outcome does not depend on their order.

    What is added waits in a list and is merged once the list is as long as what was merged before, so the cost of
    merging is amortised and memory stays below 32 bytes a distinct key and 32 MB.
    """

    _PENDING = 1 << 20  # keys that may wait at least

    def __init__(self) -> None:
        self._keys = np.zeros(0, np.uint64)  # sorted, distinct
        self._counts = np.zeros(0, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting = 0
        self._lock = threading.Lock()

    def add(self, keys_N: np.ndarray) -> None:
        keys, counts = count(keys_N)
        with self._lock:
            self._pending.append((keys, counts))
            self._waiting += len(keys)
            if self._waiting > max(self._PENDING, len(self._keys)):
                self._merge()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(distinct keys in increasing order, counts)."""
        with self._lock:
            self._merge()
            return self._keys, self._counts

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(k for k, _ in self._pending)])
        counts = np.concatenate([self._counts, *(c for _, c in self._pending)])
        order = np.argsort(keys)
        keys = keys[order]
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
        self._keys = keys[first]
        self._counts = np.add.reduceat(counts[order], first) if len(first) else np.zeros(0, np.int64)
        self._pending, self._waiting = [], 0


class Vocabulary:
    """Keys -> ids 1, 2, ... by decreasing count, ties by increasing key; 0 for every other key.

    keys, counts: what was counted on the train split.
    min_count: rarer keys get no id.   limit: at most this many ids, the reserved one included.

    The keys lie sorted by their mixed value, which spreads them evenly, and `_starts` says for every value of the top
    bits where to begin: a look-up is about two reads, whatever the size.
    """

    def __init__(self, keys: np.ndarray, counts: np.ndarray, *, min_count: int = 1, limit: int | None = None) -> None:
        kept = np.flatnonzero(counts >= min_count)
        order = kept[np.lexsort((keys[kept], -counts[kept]))]
        if limit is not None:
            order = order[: limit - 1]
        self.counts = counts[order]  # of id 1, 2, ...
        self.unseen = int(counts.sum() - self.counts.sum())
        mixed = mix64(keys[order])
        by_value = np.argsort(mixed)
        self._bits = max(1, int(2 * len(order)).bit_length())
        self._shift = np.uint64(64 - self._bits)
        # One more than the largest key may follow the last: a key of all ones as a stop, with id 0.
        self._mixed = np.concatenate([mixed[by_value], [np.uint64(2**64 - 1)]])
        self._ids = np.concatenate([by_value + 1, [0]]).astype(np.int64)
        buckets = np.arange(1 << self._bits, dtype=np.uint64) << self._shift
        narrow = np.int32 if len(order) < 2**31 - 1 else np.int64
        self._starts = np.searchsorted(self._mixed, buckets).astype(narrow)

    @classmethod
    def in_order(cls, keys: np.ndarray) -> "Vocabulary":
        """The vocabulary that gives these keys the ids 1, 2, ...; its counts mean nothing."""
        return cls(keys, np.arange(len(keys), 0, -1))

    @property
    def cardinality(self) -> int:
        return len(self.counts) + 1

    @property
    def keys(self) -> np.ndarray:
        """uint64, the key of id 1, 2, ...: worked out when asked for, to save the memory."""
        found = np.zeros(len(self.counts), np.uint64)
        found[self._ids[:-1] - 1] = unmix64(self._mixed[:-1])
        return found

    def look_up(self, keys_N: np.ndarray) -> np.ndarray:
        """int64 ids of uint64 keys."""
        wanted_N = mix64(keys_N)
        at_N = self._starts[wanted_N >> self._shift]
        behind = np.flatnonzero(self._mixed[at_N] < wanted_N)
        while len(behind):
            at_N[behind] += 1
            behind = behind[self._mixed[at_N[behind]] < wanted_N[behind]]
        return np.where(self._mixed[at_N] == wanted_N, self._ids[at_N], 0)


class Sample:
    """A sample of (row key, number) pairs for quantiles: all of them up to `limit`, then those with the smallest keys.

    Row keys are hashes, so the sample is random and does not depend on the order of adding.  With 2**20 numbers a
    quantile q is off by sqrt(q (1-q) / 2**20), 0.05% of the rows at most, one standard deviation.
    """

    def __init__(self, limit: int = 1 << 20) -> None:
        self._limit, self._below = limit, np.uint64(2**64 - 1)
        self._keys, self._numbers = np.zeros(0, np.uint64), np.zeros(0, np.float64)

    def add(self, keys_N: np.ndarray, numbers_N: np.ndarray) -> None:
        here = keys_N <= self._below
        self._keys = np.concatenate([self._keys, keys_N[here]])
        self._numbers = np.concatenate([self._numbers, numbers_N[here].astype(np.float64)])
        while len(self._keys) > self._limit:
            self._below >>= np.uint64(1)
            here = self._keys <= self._below
            self._keys, self._numbers = self._keys[here], self._numbers[here]

    @property
    def size(self) -> int:
        return len(self._keys)

    def quantiles(self, shares: list[float]) -> np.ndarray:
        """The smallest sampled numbers below which each share of the sample lies; empty when nothing was added."""
        ordered = np.sort(self._numbers)
        at = [min(len(ordered) - 1, int(np.ceil(s * len(ordered)))) for s in shares] if len(ordered) else []
        return ordered[at]
