"""The op in plain torch and float64: slow and true.  Every other backend is tested against it.

Letters in shapes: B bags of a feature, N ids, U different rows among the ids of a table, D columns, X all columns.
"""

import torch
from torch import Tensor

from kernels.int8 import quantise
from kernels.ops import Optimizer, Spec, State, check_ids, random_bits

SPEED = {"cpu": 1, "cuda": 1}


def available() -> bool:
    return True


def supports(spec: Spec, device: torch.device) -> str | None:
    return None


class Kernel:
    def __init__(self, spec: Spec, state: State) -> None:
        self.spec, self.state = spec, state

    def forward(self, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None) -> Tensor:
        check_ids(self.spec, ids_N, offsets)
        scale_N = self._scale(ids_N, offsets, weights_N)
        parts = []
        for f, t in enumerate(self.spec.features):
            at_N, bag_N, bags = self._places(f, offsets)
            rows_ND = self.state.read(t, ids_N[at_N].long()).double() * scale_N[at_N, None]
            if self.spec.pooling == "none":
                parts.append(rows_ND)
            else:
                parts.append(rows_ND.new_zeros(bags, rows_ND.shape[1]).index_add_(0, bag_N, rows_ND))
        return torch.cat(parts, dim=0 if self.spec.pooling == "none" else 1).to(self.spec.output)

    def backward_update(
        self, grad: Tensor, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None, *, weights_grad: bool
    ) -> Tensor | None:
        check_ids(self.spec, ids_N, offsets)
        self.state.step += 1
        scale_N = self._scale(ids_N, offsets, None)
        grad_N = torch.zeros(ids_N.numel(), device=grad.device) if weights_grad else None
        for t, features in enumerate(self.spec.features_of):
            ids, grads = [], []
            for f in features:
                at_N, bag_N, _ = self._places(f, offsets)
                if self.spec.pooling == "none":
                    grad_ND = grad[at_N].double()
                else:
                    grad_ND = grad[bag_N, self.spec.columns[f] : self.spec.columns[f + 1]].double()
                if grad_N is not None:
                    rows_ND = self.state.read(t, ids_N[at_N].long()).double()
                    grad_N[at_N] = ((grad_ND * rows_ND).sum(1) * scale_N[at_N]).float()
                if self.spec.optimizer.max_gradient is not None:
                    grad_ND = grad_ND.clamp(-self.spec.optimizer.max_gradient, self.spec.optimizer.max_gradient)
                if weights_N is not None:
                    grad_ND = grad_ND * weights_N[at_N, None].double()
                ids.append(ids_N[at_N].long())
                grads.append(grad_ND * scale_N[at_N, None])
            if sum(part.numel() for part in ids):
                self._update(t, torch.cat(ids), torch.cat(grads))
        return grad_N

    def _places(self, f: int, offsets: Tensor) -> tuple[Tensor, Tensor, int]:
        """Of one feature: where its ids are in ids_N, the bag of each, and how many bags there are."""
        bags = (offsets.numel() - 1) // len(self.spec.features)
        starts = offsets[f * bags : (f + 1) * bags + 1].long()
        bag_N = torch.repeat_interleave(torch.arange(bags, device=offsets.device), starts.diff())
        return torch.arange(int(starts[0]), int(starts[-1]), device=offsets.device), bag_N, bags

    def _scale(self, ids_N: Tensor, offsets: Tensor, weights_N: Tensor | None) -> Tensor:
        """What each id's row is multiplied with: its weight, and 1 / L for mean pooling."""
        scale_N = torch.ones(ids_N.numel(), dtype=torch.float64, device=ids_N.device)
        if weights_N is not None:
            scale_N = weights_N.detach().double()
        if self.spec.pooling == "mean":
            lengths = offsets.long().diff()
            scale_N = scale_N / torch.repeat_interleave(lengths, lengths)
        return scale_N

    def _update(self, t: int, ids_N: Tensor, grad_ND: Tensor) -> None:
        rows_U, at_N = torch.unique(ids_N, return_inverse=True)
        g_UD = grad_ND.new_zeros(len(rows_U), grad_ND.shape[1]).index_add_(0, at_N, grad_ND)
        views = {name: self.state.state_views(name)[t] for name in self.state.states}
        states = {name: view[rows_U].double() for name, view in views.items()}
        w_UD = self.state.read(t, rows_U).double()
        new_UD = update(self.spec.optimizer, w_UD, g_UD, states, lr=self.state.lr, step=self.state.step)
        for name, view in views.items():
            view[rows_U] = states[name].float()
        new_UD = new_UD.float()
        if not self.spec.stochastic or self.spec.weights == torch.float32:
            self.state.write(t, new_UD, rows_U)
            return
        bits_UD = random_bits(self.spec, step=self.state.step, table=t, rows_U=rows_U, dim=new_UD.shape[1])
        if self.spec.weights == torch.int8:
            self.state.tables[t][rows_U], self.state.scale_views[t][rows_U] = quantise(new_UD, bits_UD)
        else:
            self.state.tables[t][rows_U] = round_at_random(new_UD, bits_UD, self.spec.weights).to(self.spec.weights)


def update(opt: Optimizer, w_UD: Tensor, g_UD: Tensor, states: dict[str, Tensor], *, lr: float, step: int) -> Tensor:
    """The rows after one update; `states` of these rows, (U, D) or (U,), change in place."""
    decay = opt.weight_decay
    if opt.decay == "l2":
        g_UD = g_UD + decay * w_UD
    keep = 1 - lr * decay if opt.decay == "decoupled" else 1.0
    first, second = states.get("momentum1"), states.get("momentum2")
    if opt.kind == "sgd":
        new_UD = w_UD - lr * g_UD
    elif opt.kind == "adagrad":
        first += g_UD.square()
        new_UD = w_UD - lr * g_UD / (first.sqrt() + opt.eps)
    elif opt.kind == "rowwise_adagrad":
        first += g_UD.square().mean(1)
        new_UD = keep * w_UD - (lr / (first.sqrt() + opt.eps))[:, None] * g_UD
    else:
        squares = g_UD.square() if opt.kind == "adam" else g_UD.square().mean(1)
        first.mul_(opt.beta1).add_(g_UD, alpha=1 - opt.beta1)
        second.mul_(opt.beta2).add_(squares, alpha=1 - opt.beta2)
        root = (second / (1 - opt.beta2**step)).sqrt() + opt.eps
        root = root if opt.kind == "adam" else root[:, None]
        new_UD = keep * w_UD - lr * first / (1 - opt.beta1**step) / root
    if opt.max_norm is not None:
        norm_U1 = new_UD.norm(dim=1, keepdim=True)
        new_UD = torch.where(norm_U1 > opt.max_norm, new_UD * (opt.max_norm / norm_U1), new_UD)
    return new_UD


def round_at_random(x_UD: Tensor, bits_UD: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 -> float32 that `dtype` holds exactly: one of the two neighbours, the nearer one more likely.

    Random bits are added to the bits that the dtype drops, which are then cut off.  Half-precision numbers below
    2**-14 stand 2**-24 apart: there the fraction of x / 2**-24 is what is compared with the random bits.
    """
    drop = 16 if dtype == torch.bfloat16 else 13
    raw = x_UD.view(torch.int32).long() & 0xFFFFFFFF
    raw = (raw + (bits_UD & ((1 << drop) - 1))) & ~((1 << drop) - 1) & 0xFFFFFFFF
    rounded = torch.where(raw >= 1 << 31, raw - (1 << 32), raw).int().view(torch.float32)
    if dtype == torch.float16:
        grid = torch.floor(x_UD.abs() * 2.0**24 + (bits_UD & 0x1FFF).float() * 2.0**-13) * 2.0**-24
        rounded = torch.where(x_UD.abs() < 2.0**-14, torch.copysign(grid, x_UD), rounded)
    return torch.where(x_UD.isfinite(), rounded, x_UD)
