"""Which precision the dense layers are computed in, and why."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Precision:
    """name: "fp32" or "bf16" (autocast; weights, sums of the loss and the tables stay float32)."""

    name: str
    why: str

    @property
    def is_bf16(self) -> bool:
        return self.name == "bf16"


def choose(asked: str, device: torch.device) -> Precision:
    """asked: "fp32", "bf16" or "auto", which is bf16 on a CPU that multiplies bf16 matrices in hardware.

    It goes by what the CPU says of itself, not by a measurement: a run that is repeated must choose the same.
    docs/kernels.md has the measurement behind the rule.
    """
    if asked != "auto":
        return Precision(name=asked, why="asked for")
    if device.type != "cpu":
        return Precision(name="fp32", why=f'"auto" is float32 on {device.type}: bf16 is not measured there yet')
    for feature, title in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX-512 BF16")):
        if getattr(torch.cpu, feature, bool)():
            return Precision(name="bf16", why=f"this CPU multiplies bf16 matrices in hardware ({title})")
    return Precision(name="fp32", why="this CPU has neither AMX nor AVX-512 BF16")
