"""A linear layer with its ReLU as one op: y = max(x W^T + b, 0), or without the maximum.

    y_BM = linear(x_BN, weight_MN, bias_M, relu=True)      # differentiable in all three; autocast as for torch's linear

On the CPU the product and the bias are one call of oneDNN, also in float32, where torch would call MKL: that one is
slow where N is odd, as it is behind a dot interaction.  The ReLU is done in place; under autocast the weights are cast
once for both directions and the bias's gradient is summed in float32.  oneDNN could do the ReLU in its product, but its
ReLU of NaN is 0, which would hide from the loss that a layer has gone wrong.  On other devices, and for dtypes that
oneDNN lacks, it is torch's linear and relu.

Shapes: B samples, N inputs, M outputs.
"""

from functools import cache

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear, and the ReLU behind it if asked for, by `linear`."""

    def __init__(self, inputs: int, outputs: int, *, relu: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.relu = relu

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, relu=self.relu)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"


def linear(x_BN: Tensor, weight_MN: Tensor, bias_M: Tensor, *, relu: bool) -> Tensor:
    """(B, M); see the file's docstring."""
    if x_BN.device.type != "meta" and torch.is_autocast_enabled(x_BN.device.type):
        x_BN = x_BN.to(torch.get_autocast_dtype(x_BN.device.type))
    if x_BN.device.type != "cpu" or x_BN.dim() != 2 or not x_BN.numel() or not _onednn(x_BN.dtype):
        y_BM = nn.functional.linear(x_BN, weight_MN, bias_M)
        return torch.relu(y_BM) if relu else y_BM
    return _Linear.apply(x_BN, weight_MN, bias_M, relu)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BN, weight_MN, bias_M, relu):
        weight, bias = weight_MN.detach().to(x_BN.dtype), bias_M.detach().to(x_BN.dtype)
        y_BM = torch.ops.mkldnn._linear_pointwise(x_BN, weight, bias, "none", [], "")
        if relu:
            torch.relu_(y_BM)
        ctx.save_for_backward(x_BN, weight, y_BM if relu else None)
        ctx.dtypes = weight_MN.dtype, bias_M.dtype
        return y_BM

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_BM):
        x_BN, weight_MN, y_BM = ctx.saved_tensors
        if y_BM is not None:
            g_BM = torch.ops.aten.threshold_backward(g_BM, y_BM, 0)
        grad_BN = None
        if ctx.needs_input_grad[0]:
            if x_BN.dtype == torch.float32:
                grad_BN = torch.ops.mkldnn._linear_pointwise(g_BM.contiguous(), weight_MN.t(), None, "none", [], "")
            else:
                grad_BN = g_BM @ weight_MN
        grad_MN = g_BM.t() @ x_BN
        weight_dtype, bias_dtype = ctx.dtypes
        return grad_BN, grad_MN.to(weight_dtype), g_BM.sum(0, dtype=bias_dtype), None


@cache
def _onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
