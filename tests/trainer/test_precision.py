"""precision = "auto" goes by what the CPU says of itself."""

import pytest
import torch

from trainer.precision import choose


@pytest.mark.parametrize(
    "amx, avx512, name, why",
    [(True, True, "bf16", "AMX"), (False, True, "bf16", "AVX-512 BF16"), (False, False, "fp32", "neither")],
)
def test_auto(monkeypatch, amx, avx512, name, why):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    found = choose("auto", torch.device("cpu"))
    assert found.name == name and why in found.why and found.is_bf16 == (name == "bf16")
    assert choose("auto", torch.device("cuda")).name == "fp32"
    assert choose("bf16", torch.device("cpu")).why == "asked for"


def test_a_torch_that_cannot_say(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert choose("auto", torch.device("cpu")).name == "fp32"
