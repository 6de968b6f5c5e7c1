"""A training run as named tensors: the same names and global sizes for every world size, plan and table kernel.

    tables/TABLE/weight             (E, D) as stored; with the states of one number per element beside it
    tables/TABLE/STATE:C0-C1        (E,) a state of one number per row, of the table's columns C0 .. C1-1
    tables/TABLE/scale:C0-C1        (E,) likewise, the scales of rows of int8 (kernels/int8.py)
    tables/TABLE/updates            (E,) int32, in how many steps a row was updated, where the run counts that
    tables/TABLE/parts:P0-P1/...    of a table whose rows are given to ids: by_id.py
    dense/NAME                      parameters and buffers outside the tables, equal on all ranks
    optimizer/PARAMETER/STATE       of the dense layers
    ranks/RANK/...                  what is each rank's own: random number generators, running statistics, metrics

Shapes: E rows, D columns, W ranks.
"""

import base64
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from kernels.errors import UserError
from sharding.embeddings import stored_dim
from sharding.plan import embeddings_of
from sharding.table_state import SCALE, WEIGHT, Held, held_parts, set_updates
from sharding.touched import Key
from sharding.update_counts import UPDATES, held_counts
from trainer.checkpoint import by_id, scaled
from trainer.checkpoint.agree import together
from trainer.checkpoint.chain import Chain
from trainer.checkpoint.storage import Part, whole
from trainer.optim.base import TABLES, table_of

# States of optimizers in plain torch (trainer/optim, for data_parallel tables) under the names of the fused ones.
FUSED_NAMES = {"m": "exp_avg", "v": "exp_avg_sq"}
EXTRA = "_extra_state"  # what torch names the result of a module's get_extra_state


def parts_of(model: nn.Module, optimizer: Any | None, *, fused: bool = True) -> list[Part]:
    """Everything that the ranks hold together.

    model: DistributedModelParallel over a TrainTask.  optimizer: what build_optimizer made; None leaves all states out.
    fused: with the tables that are updated in the backward, of which a delta has rows alone.
    """
    physical = {table.name: table for table in embeddings_of(model.module).physical}
    sizes = {name: (table.rows, stored_dim(table.dim)) for name, table in physical.items()}
    parts = [replace(_table_part(held, sizes[held.table]), watched=True) for held in held_parts(model.module)]
    if optimizer is None:
        parts = [part for part in parts if part.name.rpartition("/")[2].partition(":")[0] in (WEIGHT, SCALE)]
    in_backward = {part.table for part in parts}
    counts = (
        [_table_part(held, sizes[held.table]) for held in held_counts(model.module)] if optimizer is not None else []
    )
    given = embeddings_of(model.module).by_id
    parts += [replace(part, watched=True) for part in counts if part.table in in_backward]
    parts = parts if fused else []
    parts += [part for part in counts if part.table not in in_backward]
    for name, value in model.state_dict().items():
        if name.startswith(TABLES):
            table = table_of(name)
            if table in given:
                continue
            if table not in in_backward and not isinstance(value, ShardedTensor):
                parts.append(_replicated(table, WEIGHT, value, sizes[table]))
            continue
        if isinstance(value, ShardedTensor):
            parts += [
                Part(
                    name=f"dense/{name}",
                    size=tuple(value.size()),
                    offset=tuple(shard.metadata.shard_offsets),
                    tensor=shard.tensor,
                )
                for shard in value.local_shards()
            ]
        elif not isinstance(value, Tensor):
            parts.append(whole(f"dense/{name}", _as_tensor(value)))
        elif name not in _statistics(model):
            parts.append(whole(f"dense/{name}", value))
    for name, state, value in _states(optimizer) if optimizer is not None else ():
        if not name.startswith(TABLES):
            parts.append(whole(f"optimizer/{name}/{state}", value))
        elif state != "step":
            table = table_of(name)
            parts.append(_replicated(table, FUSED_NAMES.get(state, state), value, sizes[table]))
    return parts


def delta_parts(model: nn.Module, touched: Mapping[Key, Tensor]) -> list[Part]:
    """The touched rows of this rank's table parts, copied: their numbers, weights and states."""
    found = []
    for held in [*held_parts(model.module), *held_counts(model.module)]:
        rows_U = touched.get((held.table, held.row, held.column))  # None: replicated
        if rows_U is None or not len(rows_U):
            continue
        prefix = f"tables/{held.table}/delta:{held.row}-{held.column}"
        tensors = {held.what: held.tensor.index_select(0, rows_U)}
        if held.what == WEIGHT:
            tensors["rows"] = rows_U + held.row
        for what, tensor in tensors.items():
            found.append(replace(whole(f"{prefix}/{what}", tensor.cpu()), table=held.table, copied=True))
    return found


def own_parts(model: nn.Module, rank: int, metrics: Mapping[str, Tensor]) -> list[Part]:
    """What is this rank's alone: statistics of its rows, its random number generators, its share of the metrics."""
    found = {f"buffers/{name}": buffer for name, buffer in _statistics(model).items()}
    found |= {f"metrics/{name}": tensor for name, tensor in metrics.items()}
    found["rng"] = _as_tensor(rng_state(model))
    return [whole(f"ranks/{rank}/{name}", tensor) for name, tensor in found.items()]


def load(model: nn.Module, optimizer: Any | None, chain: Chain) -> None:
    """Fill the model, and the optimizer where one is given, from a checkpoint of any world size, plan and kernel.

    All ranks together.  The ranks' statistics become their mean, which `load_own` replaces by each rank's own.
    Raises Damaged, or UserError for another model.
    """
    manifest = chain.manifest

    def fit() -> tuple[list[Part], list[Part], Callable[[], None], Callable[[], None]]:
        if optimizer is not None:
            _make_states(optimizer, chain)
        parts = parts_of(model, optimizer)
        _check_names(parts, chain, with_optimizer=optimizer is not None)
        if not counts_updates(chain):
            for part in (part for part in parts if _is_count(part)):
                part.tensor.zero_()
            parts = [part for part in parts if not _is_count(part)]
        extra = [part for part in parts if part.name.endswith(EXTRA)]
        parts, merge_scales = scaled.fit([part for part in parts if not part.name.endswith(EXTRA)], chain)
        return extra, *_fit_row_states(parts, chain), merge_scales

    with torch.no_grad():
        extra, direct, merge, merge_scales = together(fit)  # a rank may lack a table of those that do not fit
        chain.load(direct)
        merge()
        merge_scales()
        new = by_id.load(model, chain, with_states=optimizer is not None)
        if new:
            raise UserError(f"table {new[0]!r}: the checkpoint has no id map of it; it was written with another kind")
        for part in extra:
            module, _, _ = part.name.removeprefix("dense/").rpartition(".")
            model.module.get_submodule(module).set_extra_state(_from_tensor(chain.read(part.name)))
        world = manifest.position.world_size
        for name, buffer in _statistics(model).items():
            of_rank = [chain.read(f"ranks/{rank}/buffers/{name}") for rank in range(world)]
            buffer.copy_(torch.stack(of_rank).mean(dim=0) if world > 1 else of_rank[0])
        if optimizer is not None:
            set_updates(model.module, manifest.position.step)
            for name, state, value in _states(optimizer):
                if name.startswith(TABLES) and state == "step":
                    value.fill_(manifest.position.step)


def counts_updates(chain: Chain) -> bool:
    """Whether it says in how many steps each row was updated."""
    return any(name.endswith(f"/{UPDATES}") for name in chain.tensors)


def _is_count(part: Part) -> bool:
    return part.table is not None and part.name.endswith(f"/{UPDATES}")


def load_own(model: nn.Module, rank: int, world_size: int, metrics: Mapping[str, Tensor], chain: Chain) -> bool:
    """This rank's own part of a resumed run: as it was for an equal number of ranks, and then True.

    For another number the metrics' sums go to rank 0 (they are added over the ranks anyway), the statistics keep their
    mean and the random number generators stay as they start.
    """
    written = chain.manifest.position.world_size
    with torch.no_grad():
        if written == world_size:
            for name, buffer in _statistics(model).items():
                buffer.copy_(chain.read(f"ranks/{rank}/buffers/{name}"))
            for name, tensor in metrics.items():
                tensor.copy_(chain.read(f"ranks/{rank}/metrics/{name}"))
            set_rng_state(model, _from_tensor(chain.read(f"ranks/{rank}/rng")))
        elif rank == 0:
            for name, tensor in metrics.items():
                tensor.copy_(sum(chain.read(f"ranks/{r}/metrics/{name}") for r in range(written)))
    return written == world_size


def rng_state(model: nn.Module) -> dict[str, Any]:
    """Of the generators that training may draw from: torch's (and the GPU's), Python's and NumPy's."""
    kind, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    found = {
        "torch": _text(torch.get_rng_state()),
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), *rest],
    }
    if _device(model).type == "cuda":
        found["cuda"] = _text(torch.cuda.get_rng_state(_device(model)))
    return found


def set_rng_state(model: nn.Module, found: dict[str, Any]) -> None:
    torch.set_rng_state(_bytes(found["torch"]))
    version, numbers, gauss = found["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = found["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    if "cuda" in found and _device(model).type == "cuda":
        torch.cuda.set_rng_state(_bytes(found["cuda"]), _device(model))


def _table_part(held: Held, size: tuple[int, int]) -> Part:
    name = f"tables/{held.table}/{held.what}"
    if held.what == UPDATES:
        return Part(name=name, size=size[:1], offset=(held.row,), tensor=held.tensor, table=held.table)
    if held.tensor.dim() == 1:
        name += f":{held.column}-{held.column + held.columns}"
        return Part(name=name, size=size[:1], offset=(held.row,), tensor=held.tensor, table=held.table)
    return Part(name=name, size=size, offset=(held.row, held.column), tensor=held.tensor, table=held.table)


def _replicated(table: str, what: str, tensor: Tensor, size: tuple[int, int]) -> Part:
    """Of a data_parallel table, which every rank has all of."""
    per_row = tensor.numel() == size[0]
    tensor = tensor.detach().view(-1) if per_row else tensor.detach().view(size)
    return _table_part(Held(table=table, what=what, row=0, column=0, columns=size[1], tensor=tensor), size)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """Floating-point buffers outside the tables, which each rank gathers from its own rows (batch norm's)."""
    named = model.module.named_buffers()
    kept = model.state_dict()
    clean = ((name.replace("module.", ""), buffer) for name, buffer in named)
    return {
        name: buffer
        for name, buffer in clean
        if buffer.is_floating_point() and not name.startswith("embeddings.") and name in kept
    }


def _states(optimizer: Any) -> Iterable[tuple[str, str, Tensor]]:
    """(parameter, state, value) of the optimizers that are not fused into the backward."""
    for _, part in optimizer.optimizers[1:]:
        for name, parameter in part.params.items():
            for state, value in part.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield name, state, value


def _make_states(optimizer: Any, chain: Chain) -> None:
    """Torch's optimizers make their state at the first step: have it made, to be filled.

    The step has zero gradients, and changes weights by their decay alone; they are loaded afterwards.
    """
    if not any(name.startswith("optimizer/") for name in chain.tensors):
        return  # it was saved before the first step, or has none
    for _, part in optimizer.optimizers[1:]:
        part.init_state()
        part.zero_grad(set_to_none=True)


def _check_names(parts: list[Part], chain: Chain, *, with_optimizer: bool) -> None:
    kinds = ("dense/", "optimizer/") if with_optimizer else ("dense/",)
    ours = {part.name for part in parts if part.name.startswith(kinds)}
    theirs = {name for name in chain.tensors if name.startswith(kinds)}
    if ours != theirs:
        only = [f"{name} is in the checkpoint alone" for name in sorted(theirs - ours)]
        only += [f"{name} is in the model alone" for name in sorted(ours - theirs)]
        more = f" (and {len(only) - 3} more)" if len(only) > 3 else ""
        raise UserError(f"the checkpoint was written by another model or dense optimizer: {'; '.join(only[:3])}{more}")


def _fit_row_states(parts: list[Part], chain: Chain) -> tuple[list[Part], Any]:
    """Parts to read, and what to call afterwards, where a table is cut by other columns than when it was saved.

    A row has one number per column part, an average or a sum over averages of its columns (row-wise Adagrad's).  A part
    gets the mean of the numbers that its columns had, weighted by how many had them: 16 columns saved as 0-8: 1.0 and
    8-16: 3.0 become 0-16: 2.0, which is the number that the uncut row would have; 0-16: 2.0 becomes 2.0 and 2.0.
    """
    tensors = chain.tensors
    direct: list[Part] = []
    shared: dict[tuple[str, int, int], Part] = {}
    merges: list[tuple[Tensor, list[tuple[float, Tensor]]]] = []
    for part in parts:
        base, colon, columns = part.name.rpartition(":")
        if part.table is None or not colon or part.name in tensors:
            direct.append(part)
            continue
        first, end = map(int, columns.split("-"))
        sources = []
        for name in tensors:
            if not name.startswith(f"{base}:"):
                continue
            a, b = map(int, name.rpartition(":")[2].split("-"))
            if share := min(end, b) - max(first, a):
                if share < 0:
                    continue
                key = (name, part.offset[0], part.tensor.shape[0])
                if key not in shared:
                    room = torch.empty_like(part.tensor, device="cpu")
                    shared[key] = Part(name=name, size=part.size, offset=part.offset, tensor=room, table=part.table)
                sources.append((share / (end - first), shared[key].tensor))
        if not sources:
            raise UserError(f"{part.name} is not in the checkpoint: it was written with another table optimizer")
        merges.append((part.tensor, sources))

    def merge() -> None:
        for into, sources in merges:
            into.copy_(sum(weight * tensor.double() for weight, tensor in sources))

    return direct + list(shared.values()), merge


def _as_tensor(value: Any) -> Tensor:
    """A plain value (what JSON can hold) as bytes."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_tensor(tensor: Tensor) -> Any:
    return json.loads(tensor.numpy().tobytes())


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _device(model: nn.Module) -> torch.device:
    return model.device
