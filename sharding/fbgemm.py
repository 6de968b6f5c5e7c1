"""What FBGEMM's own kernels, as TorchRec uses them, can do with a table's update."""

from typing import Any

import torch

from kernels.errors import UserError
from kernels.ops import Optimizer


def fused_params(optimizer: Optimizer, *, device: torch.device) -> dict[str, Any]:
    """TorchRec's fused_params for FBGEMM's kernel.

    Raises UserError for an update that FBGEMM does not have on this device, with the way out.
    """
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode

    if optimizer.kind in ("adam", "rowwise_adam") and device.type == "cpu":
        raise UserError(
            f'optim.sparse.kind = "{optimizer.kind}": FBGEMM has no fused Adam for tables on the CPU; use '
            'kernels.embedding_bag = "auto", or "rowwise_adagrad", "adagrad" or "sgd"'
        )
    params: dict[str, Any] = {
        "optimizer": {
            "sgd": EmbOptimType.EXACT_SGD,
            "adagrad": EmbOptimType.EXACT_ADAGRAD,
            "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "adam": EmbOptimType.ADAM,
            "rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
        }[optimizer.kind],
        "learning_rate": optimizer.lr,
    }
    if optimizer.kind != "sgd":
        params["eps"] = optimizer.eps
    if optimizer.kind in ("adam", "rowwise_adam"):
        params |= {"beta1": optimizer.beta1, "beta2": optimizer.beta2}
    if optimizer.weight_decay and not lacks_decay(optimizer, device=device):
        mode = WeightDecayMode.L2 if optimizer.decay == "l2" else WeightDecayMode.DECOUPLE
        params |= {"weight_decay": optimizer.weight_decay, "weight_decay_mode": mode}
    return params


def lacks_decay(optimizer: Optimizer, *, device: torch.device) -> bool:
    """Whether a weight decay was asked for that FBGEMM's kernel does not apply: `sharding.row_update` then does it.

    Its CPU kernels take the argument and ignore it; on a GPU only row-wise Adagrad has L2.
    """
    return bool(optimizer.weight_decay) and (device.type == "cpu" or optimizer.kind != "rowwise_adagrad")
