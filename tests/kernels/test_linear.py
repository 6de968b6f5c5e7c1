"""kernels.linear is torch's linear and relu: outputs, gradients, autocast, NaN."""

import pytest
import torch

from kernels.linear import Linear, linear


def both(x_BN, layer, relu, *, bf16=False):
    """[y, gradients of x, weight, bias] of ours and of torch's."""
    found = []
    for ours in (True, False):
        x = x_BN.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            if ours:
                y = linear(x, layer.weight, layer.bias, relu=relu)
            else:
                y = torch.nn.functional.linear(x, layer.weight, layer.bias)
                y = torch.relu(y) if relu else y
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
        found.append([y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    return zip(*found, strict=True)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("samples, inputs, outputs", [(7, 13, 5), (64, 415, 33), (1, 1, 1), (0, 4, 3), (32, 16, 1)])
def test_as_torch_does_it(samples, inputs, outputs, relu, bf16):
    torch.manual_seed(1)
    for got, want in both(torch.randn(samples, inputs), Linear(inputs, outputs, relu=relu), relu, bf16=bf16):
        assert got.dtype == want.dtype
        loose = {"rtol": 2e-2, "atol": 2e-2 * max(1, samples / 8)} if bf16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(got, want, **loose)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_go_through_the_relu(dtype):
    x_BN = torch.ones(3, 32, dtype=dtype)
    x_BN[1, 5], x_BN[2, 5] = float("nan"), float("inf")
    y_BM = linear(x_BN, torch.ones(32, 32, dtype=dtype), torch.zeros(32, dtype=dtype), relu=True)
    assert y_BM[0].isfinite().all() and y_BM[1].isnan().all() and y_BM[2].isinf().all()


def test_a_layer_without_a_gradient_for_its_input():
    layer = Linear(4, 3, relu=True)
    layer(torch.randn(5, 4)).sum().backward()
    assert layer.weight.grad is not None and "relu=True" in repr(layer)
