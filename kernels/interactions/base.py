"""What a backend of the dot interaction is: a module kernels/interactions/NAME.py that has the names below, all of it.

SPEED: {"cpu": 3, ...}, a rank per kind of device; `auto` asks the highest first, and names refusals of these alone.

`available() -> bool`: whether what it needs is installed and works here; cheap, and never raises.

`supports(spec, device) -> str | None`: None, or the reason why not, for a person.  Includes what `available()` knows.
A backend that serves a spec serves it in float32 and bfloat16 (kernels.interaction.DotInteraction.forward), sums in
float32 and rounds once.

`Kernel(spec)`: the op of kernels/interaction.py; what has to be compiled is compiled when it is made.

Results may not depend on the number of threads.  The modules are imported by `auto` even where they cannot serve, so
they import torch and the standard library alone at module level.
"""

from typing import Protocol

from torch import Tensor


class Kernel(Protocol):
    """Callers have run `kernels.interaction.check` on the inputs, which are contiguous; B may be 0."""

    def forward(self, dense_BD: Tensor | None, emb_BX: Tensor) -> Tensor:
        """out_BY, contiguous, of the dtype of dense_BD (of emb_BX where that is None)."""
        ...

    def backward(self, grad_BY: Tensor, dense_BD: Tensor | None, emb_BX: Tensor) -> tuple[Tensor | None, Tensor]:
        """(gradient of dense_BD or None, gradient of emb_BX), contiguous, each of the dtype of its input.

        grad_BY: contiguous, shaped as forward's result and of its dtype.
        """
        ...
