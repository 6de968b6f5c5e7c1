"""What one training step computes: batch -> look-up -> model -> loss.

    TrainTask(embeddings, net, ...)          on the meta device; `sharding.parallelize` makes it run
    forward(batch) -> (loss, logits_BT)      loss ready for backward(); logits float32, detached

The loss of rank r is  W * sum over its rows and tasks of (row weight * task weight * l) / rows in the global batch.
DistributedDataParallel averages dense gradients over the W ranks, and TorchRec divides the gradients of tables by W
(of data_parallel ones by the same averaging), so every gradient is that of the mean over the global batch's rows that
are not padding, whatever W is.  The mean of the ranks' losses is that mean.

A table is updated inside the backward, so a loss that is not finite is caught before it: NonFiniteLoss.

`forward` is traced symbolically by TrainPipelineSparseDist: whatever looks at values stands in a submodule (a leaf of
the tracing), or behind an exception that one raises.

Shapes: B rows of this rank, K dense inputs, X sum of the features' dims, T tasks.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.errors import UserError
from trainer.data.batch import Batch


class NonFiniteLoss(UserError):
    """The loss became NaN or infinite.

    step: the step's number, from 0 (the message counts from 1, as metrics.jsonl does).  where: the input, feature or
    layer that first had it.
    """

    def __init__(self, message: str, *, step: int, where: str) -> None:
        super().__init__(message)
        self.step, self.where = step, where


class TrainTask(nn.Module):
    """See the file's docstring.

    embeddings: sharding.embeddings.Embeddings.  net: a model of trainer/models.
    loss: "bce" (on the logits) or "mse" (of the probabilities).
    task_weights: one per task; 1 each when None.
    bf16: autocast of `net` on `device`; the loss stays in float32.
    dense_names: of the dense columns, for NonFiniteLoss.

    Set by the pipeline before each forward: `step`, and `check` (False skips the check of the loss, which on a GPU
    makes the host wait for the device).
    """

    def __init__(
        self,
        embeddings: nn.Module,
        net: nn.Module,
        *,
        world_size: int,
        device: torch.device,
        loss: str = "bce",
        task_weights: Sequence[float] | None = None,
        bf16: bool = False,
        dense_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.embeddings, self.net = embeddings, net
        self.loss = Loss(kind=loss, world_size=world_size, task_weights=tuple(task_weights) if task_weights else None)
        self.device_type, self.bf16 = device.type, bf16
        self.dense_names = tuple(dense_names)
        self.step, self.check = 0, True

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        emb_BX = self.embeddings(batch.ids)
        logits_BT = self._logits(batch.dense_BK, emb_BX)
        try:
            loss = self.loss(logits_BT, batch.labels_BT, batch.weight_B, batch.rows_in_step, self.check)
        except NotFinite as found:
            raise self._blame(batch, emb_BX.detach(), found.loss) from None
        return loss, logits_BT.detach().float()

    def _logits(self, dense_BK: Tensor, emb_BX: Tensor) -> Tensor:
        if not self.bf16:
            return self.net(dense_BK, emb_BX)
        # emb_BX stays as it is: the dot interaction reads float32 vectors without a copy of them.
        with torch.autocast(self.device_type, dtype=torch.bfloat16):
            return self.net(dense_BK.bfloat16(), emb_BX)

    @torch.no_grad()
    def _blame(self, batch: Batch, emb_BX: Tensor, loss: float) -> NonFiniteLoss:
        """The error that says where a loss that is not finite came from."""
        where = self._bad_input(batch) or self._bad_feature(batch, emb_BX) or self._bad_layer(batch, emb_BX)
        where = where or "the loss itself: the logits are finite, their loss overflows"
        rank = f" on rank {dist.get_rank()}" if dist.is_initialized() and dist.get_world_size() > 1 else ""
        return NonFiniteLoss(
            f"step {self.step + 1}{rank}: the loss is {loss}, and training stopped before it reached the tables; "
            f"the first that is not finite: {where}. If the data is right, lower optim.*.lr, warm it up, or set "
            f"optim.clip_grad_norm",
            step=self.step,
            where=where,
        )

    def _bad_input(self, batch: Batch) -> str | None:
        names = self.dense_names or [str(k) for k in range(batch.dense_BK.shape[1])]
        bad = ~batch.dense_BK.isfinite()
        if bad.any():
            b, k = bad.nonzero()[0].tolist()
            return f"dense column {names[k]!r} in {_row(batch, b)}: {batch.dense_BK[b, k].item()}"
        for name, values in (("label", batch.labels_BT), ("weight", batch.weight_B)):
            bad = ~values.isfinite()
            if bad.any():
                at = bad.nonzero()[0].tolist()
                return f"{name} in {_row(batch, at[0])}: {values[tuple(at)].item()}"
        return None

    def _bad_feature(self, batch: Batch, emb_BX: Tensor) -> str | None:
        for name, vectors_BD in zip(
            self.embeddings.features, emb_BX.split(list(self.embeddings.dims), dim=1), strict=True
        ):
            bad = ~vectors_BD.isfinite()
            if bad.any():
                return f"the embedding of feature {name!r} in {_row(batch, bad.nonzero()[0, 0].item())}"
        return None

    def _bad_layer(self, batch: Batch, emb_BX: Tensor) -> str | None:
        """Run the model again, looking at what every layer gives."""
        found: list[str] = []

        def look(path: str, layer: nn.Module, output: Tensor) -> None:
            if not found and not output.isfinite().all():
                weights = [n for n, p in layer.named_parameters(recurse=False) if not p.isfinite().all()]
                why = f"its {' and '.join(weights)} is not finite" if weights else "its inputs are finite"
                found.append(f"layer {path} ({type(layer).__name__}; {why})")

        hooks = [
            layer.register_forward_hook(lambda layer, _, output, path=f"net.{name}": look(path, layer, output))
            for name, layer in self.net.named_modules()
            if name and not any(True for _ in layer.children())
        ]
        try:
            if not self._logits(batch.dense_BK, emb_BX).isfinite().all() and not found:
                found.append("the model's logits")
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else None


class NotFinite(Exception):
    """Raised by Loss for TrainTask; never seen outside."""

    def __init__(self, loss: float) -> None:
        super().__init__()
        self.loss = loss


class Loss(nn.Module):
    """The formula of the file's docstring."""

    def __init__(self, *, kind: str, world_size: int, task_weights: tuple[float, ...] | None) -> None:
        super().__init__()
        assert kind in ("bce", "mse")
        self.kind, self.world_size, self.task_weights = kind, world_size, task_weights

    def forward(self, logits_BT: Tensor, labels_BT: Tensor, weight_B: Tensor, rows_in_step: int, check: bool) -> Tensor:
        logits_BT = logits_BT.float()
        if self.kind == "bce":
            each_BT = nn.functional.binary_cross_entropy_with_logits(logits_BT, labels_BT, reduction="none")
        else:
            each_BT = (torch.sigmoid(logits_BT) - labels_BT).square()
        if self.task_weights is not None:
            each_BT = each_BT * each_BT.new_tensor(self.task_weights)
        loss = (each_BT * weight_B[:, None]).sum() * (self.world_size / rows_in_step)
        if check and not loss.isfinite():
            raise NotFinite(loss.item())
        return loss


def _row(batch: Batch, b: int) -> str:
    row = batch.row_B[b].item()
    return f"row {row} of the split" if row >= 0 else "a padding row"
