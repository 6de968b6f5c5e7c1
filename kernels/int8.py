"""Rows of int8 with a scale each: value = number * scale, numbers from -127 to 127.

The scale of a row is the smallest power of two that its largest element needs.  A tighter one, largest / 127, would
give up to one bit more, but move with every update, and each move rounds the whole row again; with powers of two an
element that an update leaves alone keeps its value exactly, products with the scale are exact, and a row that is read
and written again is the same bit for bit.  (Int8 tables trained with rounding at random: Li et al., "Adaptive
Low-Precision Training for Embeddings in Click-Through Rate Prediction", AAAI 2023; scales that are powers of two: the
OCP Microscaling formats.)

    quantise([[0.5, -0.3, 0.0]])    largest 0.5, 127 * 2**-8 < 0.5 <= 127 * 2**-7: scale 2**-7, numbers 64, -38, 0

Shapes: U rows, D columns.
"""

import torch
from torch import Tensor

MOST = 127
SMALLEST = 2.0**-126  # the smallest normal float32: rows below it, and rows of zeros, have this scale
SCALE_BYTES = 4  # float32


def scales_of(w_UD: Tensor) -> Tensor:
    """(U, D) float32 -> (U,) float32: 2**k with the smallest k for which 127 * 2**k reaches every element of a row.

    NaN for a row with an element that is not finite, so that the row shows it.
    """
    largest_U = w_UD.abs().amax(dim=1)  # NaN where there is one
    # 127 * 2**k >= 1.m * 2**e exactly if 1.m <= 127 / 64 and k = e - 6, or else k = e - 5: the carry of this sum.
    power_U = ((largest_U.view(torch.int32) + 0x1FFFF) >> 23) - 6
    scale_U = (power_U.clamp(min=1) << 23).view(torch.float32)
    return torch.where(largest_U.isfinite(), scale_U, float("nan"))


def quantise(w_UD: Tensor, bits_UD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(U, D) float32 -> (U, D) int8 and (U,) float32 scales.

    bits_UD: 32 random bits each (kernels.ops.random_bits), of which the upper 24 decide whether a number is rounded up:
    the mean is then right.  Without them to the nearest, halves to the even one.
    """
    scale_U = scales_of(w_UD)
    x_UD = w_UD / scale_U[:, None]
    if bits_UD is None:
        x_UD = x_UD.round()
    else:
        x_UD = (x_UD + (bits_UD >> 8).float() * 2.0**-24).floor()
    return x_UD.clamp(-MOST, MOST).nan_to_num(nan=0.0).to(torch.int8), scale_U


def dequantise(numbers_UD: Tensor, scale_U: Tensor) -> Tensor:
    """(U, D) float32, exactly number * scale."""
    return numbers_UD.float() * scale_U[:, None]
