"""The op by FBGEMM's CPU operators, on the state's own buffers: the baseline, and a second opinion on every formula.

Its CPU build lacks much; `supports` names each thing.  What it accepts and then leaves undone (weight decay and
max_norm, whose arguments its kernels ignore) counts as lacking.  On a GPU, TorchRec calls FBGEMM itself.
"""

import importlib.util

import torch
from torch import Tensor

from kernels.ops import STATES, Spec, State, check_ids

SPEED = {"cpu": 2}
POOLING = {"sum": 0, "mean": 1}
ON_HOST = 3  # FBGEMM's EmbeddingLocation.HOST
FP32 = 0  # its SparseType
OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")


def available() -> bool:
    return importlib.util.find_spec("fbgemm_gpu") is not None


def supports(spec: Spec, device: torch.device) -> str | None:
    opt = spec.optimizer
    if device.type != "cpu":
        return "is its CPU operators here; TorchRec calls its GPU ones itself"
    if not available():
        return "needs fbgemm_gpu, which is not installed"
    if opt.kind not in OPTIMIZERS:
        return f"FBGEMM's CPU build has no {opt.kind}"
    if opt.weight_decay or opt.max_norm is not None:
        return "FBGEMM's CPU kernels accept weight decay and max_norm and do nothing with them"
    if spec.weights == torch.int8:
        return "FBGEMM updates no rows of int8"
    if spec.weights == torch.bfloat16 or spec.output != torch.float32:
        return "FBGEMM's CPU kernels have no bfloat16"
    if spec.weights == torch.float16 and spec.stochastic:
        return "FBGEMM's CPU kernels round float16 to nearest, not at random"
    if spec.pooling == "none":
        return "FBGEMM's unpooled CPU operators are others, which are not wrapped here"
    if spec.weighted and spec.pooling != "sum":
        return "FBGEMM defines no mean with weights of ids"
    if list(spec.features) != sorted(spec.features) or len(set(spec.features)) < len(spec.tables):
        return "FBGEMM's CPU kernels need the features in the order of their tables, and one or more a table"
    return None


class Kernel:
    def __init__(self, spec: Spec, state: State) -> None:
        import fbgemm_gpu.split_table_batched_embeddings_ops_training  # noqa: F401  registers the operators

        self.spec, self.state = spec, state
        features = spec.features
        self.columns = torch.tensor(spec.columns, dtype=torch.int32)
        self.starts = torch.tensor([spec.starts[t] for t in features])
        per_row = any(STATES[spec.optimizer.kind].values())
        self.state_starts = torch.tensor([(spec.row_starts if per_row else spec.starts)[t] for t in features])
        self.places = torch.full((len(features),), ON_HOST, dtype=torch.int32)
        # Where the rows of each feature's table begin if all were counted on: it tells FBGEMM how many a table has.
        total = [sum(table.rows for table in spec.tables[:t]) for t in range(len(spec.tables) + 1)]
        self.rows = torch.tensor([*(total[t] for t in features), total[-1]])
        self.row_bits = max(1, total[-1].bit_length())
        self.widest = max(table.dim for table in spec.tables)

    def forward(self, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None) -> Tensor:
        ids_N, offsets = ids_N.long(), offsets.long()
        # Its operators test the ids; offsets that fall would make them read anywhere.
        if int(offsets[0]) != 0 or int(offsets[-1]) != ids_N.numel() or bool((offsets.diff() < 0).any()):
            check_ids(self.spec, ids_N, offsets)
        try:
            given = (self.state.weights, self.starts, self.columns, self.spec.columns[-1], self.rows, ids_N, offsets)
            return torch.ops.fbgemm.split_embedding_codegen_forward_cpu(
                *given, POOLING[self.spec.pooling], weights_N, FP32
            )
        except RuntimeError:
            check_ids(self.spec, ids_N, offsets)
            raise

    def backward_update(
        self, grad: Tensor, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None, *, weights_grad: bool
    ) -> Tensor | None:
        spec, state, opt = self.spec, self.state, self.spec.optimizer
        ids_N, offsets = ids_N.long(), offsets.long()
        state.step += 1
        grad_N = None
        if weights_grad:
            given = (grad, state.weights, self.starts, self.columns, ids_N, offsets, None)
            grad_N = torch.ops.fbgemm.split_embedding_codegen_grad_indice_weights_cpu(*given)
        if ids_N.numel() == 0:
            return grad_N
        if opt.max_gradient is not None:
            grad = grad.clamp(-opt.max_gradient, opt.max_gradient)
        shape = (self.places, self.starts, self.columns, self.widest, self.rows, self.row_bits)
        batch = (ids_N, offsets, POOLING[spec.pooling], weights_N)
        rest = [torch.tensor(state.lr)]
        if "momentum1" in state.states:
            rest = [state.states["momentum1"], self.places, self.state_starts, *rest, opt.eps]
        name = f"split_embedding_backward_codegen_{opt.kind}_cpu"
        getattr(torch.ops.fbgemm, name)(grad, state.weights, *shape, *batch, False, *rest, output_dtype=FP32)
        return grad_N
