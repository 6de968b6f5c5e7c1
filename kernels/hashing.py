"""Hashes of 64-bit ids, on tensors and, as their slow true twins, on Python's integers.

All arithmetic is on integers modulo 2**64, so it is exact for every id up to 2**63 - 1; nothing goes through a float.

Shapes: N ids.
"""

import hashlib

from torch import Tensor

MASK = (1 << 64) - 1
LARGEST = (1 << 63) - 1
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64 (Steele, Lea and Flood, 2014)


def seed_of(*names: object) -> int:
    """A 64-bit seed that depends on every name: a table, a feature, the number of a look-up."""
    text = "/".join(str(name) for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def bucket(ids_N: Tensor, *, seed: int, rows: int) -> Tensor:
    """(N,) int64 -> (N,) int64 in 0 .. rows-1: splitmix64's finaliser of id ^ seed, its low 63 bits modulo rows."""
    x = mix64(ids_N.long() ^ _signed(seed))
    return (x & LARGEST) % rows


def bucket_of(id: int, *, seed: int, rows: int) -> int:
    """What `bucket` gives for one id, in Python's integers."""
    return (mix64_of(id ^ seed) & LARGEST) % rows


def mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, a bijection of the 64-bit numbers.

    int64's products wrap as uint64's do; its shifts must not carry the sign, hence the masks.
    """
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_FACTORS[0])
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_FACTORS[1])
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def mix64_of(x: int) -> int:
    """What `mix64` gives for one number, of which the lowest 64 bits count, in Python's integers: 0 .. 2**64 - 1."""
    x &= MASK
    x = ((x ^ (x >> 30)) * _FACTORS[0]) & MASK
    x = ((x ^ (x >> 27)) * _FACTORS[1]) & MASK
    return x ^ (x >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
