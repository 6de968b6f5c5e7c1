"""What a kernel backend is: a module kernels/backends/NAME.py that has the names below.  This is all of it.

SPEED: {"cpu": 3, ...}, a rank per kind of device; `auto` asks the highest first, and names refusals of these alone.

`available() -> bool`: whether what it needs is installed and works here; cheap, and never raises.

`supports(spec, device) -> str | None`: None, or the reason why not, for a person: "needs Numba, which is missing",
"fp16 tables with stochastic rounding: its CPU kernels round to nearest".  Includes what `available()` knows.

`Kernel(spec, state)`: the op of kernels/ops.py on one State, which it reads and changes through the state's own
buffers at each call (a checkpoint may be copied into them between two calls).  Made only after `supports` said None.

Nothing of the size of a table may be allocated by a call, and results may not depend on the number of threads.
The modules are imported by `auto` even where they cannot serve, so they import torch and the standard library alone
at module level; what else they need they import when a Kernel is made.
"""

from typing import Protocol

from torch import Tensor


class Kernel(Protocol):
    """The op on one State.  Callers have run `kernels.ops.check` on the inputs."""

    def forward(self, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None) -> Tensor:
        """(B, X) pooled or (N, D) unpooled, of spec.output.  UserError for an id outside its table."""
        ...

    def backward_update(
        self, grad: Tensor, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None, *, weights_grad: bool
    ) -> Tensor | None:
        """One update of the rows in ids_N from grad, shaped as forward's result, contiguous, of spec.output.

        Counts state.step up by one first.  Returns the gradient of weights_N, float32, if weights_grad, else None.
        """
        ...
