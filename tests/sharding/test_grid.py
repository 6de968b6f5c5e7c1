"""Every kind under every optimizer and every sharding type that it can have, on 1, 2 and 4 ranks, against `reference`.

One model has a table of each kind; a case trains its look-up alone for a few steps with gradients that are given, on
multi-hot bags of which some are empty, with or without a weight for each id.  Compared are the outputs of every step
and, at the end, all rows, optimizer states and combining parameters; so gradients too, since SGD's rows are made of
them.  All cases of a number of ranks share one process group.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sharding.embeddings import build_embeddings, physical_tables
from sharding.parallelize import parallelize
from sharding.plan import make_plan
from sharding.table_state import held_parts
from sharding.tables.base import SHARDING_TYPES, Table
from tests.models import CPU, table_shards
from tests.ranks import run_ranks
from tests.sharding.test_by_id import Twin, bags_of
from tests.sharding.test_tables import OPTIMIZERS, SEED, Reference
from trainer.models.base import init_dense
from trainer.optim.base import TABLES, build_optimizer, plugin, table_of, table_update

STEPS, BAGS = 3, 8
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("standard", {}),
    "hash": ("hashed", {"rows": 13, "seeds": 2}),
    "product": ("compositional", {"op": "mult", "parts": 3}),
    "concat": ("compositional", {"op": "concat", "partition": "chinese", "rows": 20}),
    "mixed": ("mixed_dim", {"dims": [8, 4], "blocks": [7], "ordered": True}),
    "shared": ("unified", {"rows": 23, "lookups": 2}),
    "given": ("collisionless", {"rows": 256, "admit_after": 2}),
}
GIVEN = "given"
FEATURES = tuple(f"{name}_{i}" for i in (1, 0) for name in KINDS)  # not in the order of the tables


@dataclass(frozen=True, kw_only=True)
class Case:
    sharding: str
    optimizer: str
    weighted: bool


def cases_of(ranks: int) -> list[Case]:
    """Every pair of a sharding type and an optimizer on 4 ranks; on 2 every second one, all types and all optimizers
    among them, with and without weights.  On one rank all parts are whole tables, so two types stand for the others."""
    types = ("table_wise", "data_parallel") if ranks == 1 else (*SHARDING_TYPES, "auto")
    return [
        Case(sharding=sharding, optimizer=optimizer, weighted=(i // 2 + j // 2) % 2 == 0)
        for i, sharding in enumerate(types)
        for j, optimizer in enumerate(OPTIMIZERS)
        if ranks != 2 or (i + j) % 2 == 0
    ]


def tables_of(sharding: str) -> tuple[Table, ...]:
    found = []
    for i, (name, (kind, options)) in enumerate(KINDS.items()):
        own = "row_wise" if name == GIVEN and sharding not in ("table_wise", "auto") else sharding
        found.append(
            Table(name=name, kind=kind, options=options, rows=60 if name == GIVEN else 40 + i, dim=8, init_std=0.4,
                  features=(f"{name}_0", f"{name}_1"), pooling="mean" if i % 2 else "sum", sharding=own)
        )  # fmt: skip
    return tuple(found)


def batches(weighted: bool) -> list[tuple[KeyedJaggedTensor, Tensor]]:
    """Of each step the ids of all bags, and the gradient of the output."""
    generator = torch.Generator().manual_seed(5)
    rows_of = {f: t.rows for t in tables_of("auto") for f in t.features}
    found = []
    for _ in range(STEPS):
        lengths = torch.randint(0, 4, (len(FEATURES), BAGS), generator=generator)
        values = [(torch.rand(int(n), generator=generator) ** 2 * rows_of[f]).long() for f, n in
                  zip(FEATURES, lengths.sum(1), strict=True)]  # fmt: skip
        wide = {f"{GIVEN}_0", f"{GIVEN}_1"}
        values = [v * 0x1F3D5B79A2C4E68 - 7 if f in wide else v for f, v in zip(FEATURES, values, strict=True)]
        ids_N = torch.cat(values)
        # None of them is 0: a row without a gradient counts as touched in a kernel and not in the reference.
        weights_N = 0.25 + torch.rand(len(ids_N), generator=generator) if weighted else None
        ids = KeyedJaggedTensor(keys=list(FEATURES), values=ids_N, lengths=lengths.flatten(), weights=weights_N)
        found.append((ids, torch.randn(BAGS, 8 * len(FEATURES), generator=generator)))
    return found


class Lookup(nn.Module):
    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        return self.embeddings(ids)


def trained(cases: list[Case]) -> list[dict[str, Any]]:
    return [train(case) for case in cases]


def train(case: Case) -> dict[str, Any]:
    """outputs: of this rank's bags at every step.  held: (table, state or -1 for rows, first row, first column,
    values).  dense: combining parameters.  given: id, or None for the default row -> [row, states ...]."""
    rank, ranks, optim = dist.get_rank(), dist.get_world_size(), OPTIMIZERS[case.optimizer]
    task = Lookup(build_embeddings(tables=tables_of(case.sharding), features=FEATURES, weighted=case.weighted))
    plan = make_plan(task, world_size=ranks, local_world_size=min(2, ranks), device=CPU, batch_size=BAGS // ranks)
    update = table_update(optim, plan, device=CPU, kernel="auto")
    dmp = parallelize(task, plan, device=CPU, seed=SEED, init_dense=init_dense, **update)
    optimizer = build_optimizer(optim, dmp)
    outputs = []
    mine = slice(rank * BAGS // ranks, (rank + 1) * BAGS // ranks)
    for ids, upstream_BX in batches(case.weighted):
        optimizer.zero_grad()
        emb_BX = dmp(bags_of(ids, mine))
        (ranks * emb_BX * upstream_BX[mine]).sum().backward()  # a mean over ranks is what tables learn from
        dmp.module.embeddings.after_backward()
        optimizer.step()
        outputs.append(emb_BX.detach())
    held = [(name, -1, row, column, w.clone()) for name, row, column, w in table_shards(dmp) if name != GIVEN]
    order: dict[tuple, int] = {}
    for part in held_parts(dmp.module):
        if part.what != "weight":
            key = (part.table, part.row, part.column)
            order[key] = order.get(key, -1) + 1
            held.append((part.table, order[key], part.row, part.column, part.tensor.clone()))
    for name, p in in_backward_optimizer_filter(dmp.named_parameters()):
        if name.startswith(TABLES):
            states = [s for s in optimizer.state[p].values() if s.ndim]
            held += [(table_of(name), i, 0, 0, state.clone()) for i, state in enumerate(states)]
    combine = dmp.module.embeddings.combine.named_parameters()
    return {"outputs": outputs, "held": held, "dense": {n: p.detach() for n, p in combine}, "given": given_rows(dmp)}


def given_rows(dmp: nn.Module) -> dict[int | None, list[Tensor]]:
    found = {}
    for given in (given for kernel in dmp.module.embeddings.ebc_by_id.kernels for given in kernel.rows):
        state = given.map.state_dict()
        for id, row in [(None, 0), *zip(state["ids_K"].tolist(), state["rows_K"].tolist(), strict=True)]:
            found[id] = [tensor[row].clone().view(-1) for tensor in (given.weights_ED, *given.states)]
    return found


@cache
def expected(optimizer: str, weighted: bool, cut: frozenset[str]) -> tuple:
    """(outputs, rows, states, combining parameters, twin of the given rows), id by id in one process.

    cut: physical tables whose 8 columns are two parts, each with row-wise states of its own.
    """
    optim = OPTIMIZERS[optimizer]
    kind, lr = plugin(optim.sparse), optim.sparse.lr
    plain = [t for t in tables_of("auto") if t.name != GIVEN]
    (given,) = (t for t in tables_of("auto") if t.name == GIVEN)
    model = Reference(plain, [f for f in FEATURES if f not in given.features])
    twin, states = Twin(given), {}
    dense = list(model.combine.parameters())
    of_dense = plugin(optim.dense).dense(optim.dense, dense)
    parts = {name: [slice(0, 4), slice(4, 8)] if name in cut else [slice(None)] for name in model.weights}
    for name, weight in model.weights.items():
        states[name] = [list(kind.row_state(weight.detach()[:, part]).values()) for part in parts[name]]
    outputs = []
    for step, (ids, upstream_BX) in enumerate(batches(weighted), 1):
        model.zero_grad()
        bags = ids.to_dict()
        twin.admit([bags[f] for f in given.features])
        leaves = twin.leaves()
        of_feature = dict(zip(model.features, model(ids).split(8, dim=1), strict=True))
        of_feature |= {f: pooled(twin, leaves, bags, f) for f in given.features}
        emb_BX = torch.cat([of_feature[f] for f in FEATURES], dim=1)
        (emb_BX * upstream_BX).sum().backward()
        outputs.append(emb_BX.detach())
        of_dense.step()
        for name, weight in model.weights.items():
            for part, of_part in zip(parts[name], states[name], strict=True):
                gradient = weight.grad[:, part]
                rows_U = (gradient != 0).any(1).nonzero().flatten()
                row_UD, states_U = weight.detach()[rows_U][:, part], [state[rows_U] for state in of_part]
                kind.update_rows(optim.sparse, row_UD, gradient[rows_U], states_U, lr=lr, step=step)
                weight.data[rows_U[:, None], torch.arange(weight.shape[1])[part]] = row_UD
                for state, new in zip(of_part, states_U, strict=True):
                    state[rows_U] = new
        for id, leaf in leaves.items():
            row_1D = leaf.detach()[None]
            of_row = twin.states.setdefault(id, kind.row_state(row_1D))
            kind.update_rows(optim.sparse, row_1D, leaf.grad[None], list(of_row.values()), lr=lr, step=step)
            twin.rows[id] = row_1D[0]
    return outputs, dict(model.weights), (parts, states), dict(model.combine.named_parameters()), twin


def pooled(twin: Twin, leaves: dict, bags: dict, feature: str) -> Tensor:
    """(BAGS, D) of a feature whose ids `twin` has just admitted."""
    of_feature = bags[feature]
    at = sum(bags[f].values().numel() for f in twin.table.features[: twin.table.features.index(feature)])
    weights_N, offsets = of_feature.weights_or_none(), of_feature.offsets().tolist()
    rows = []
    for start, end in zip(offsets, offsets[1:], strict=False):
        each = [leaves[twin.reads[at + n]] * (1 if weights_N is None else weights_N[n]) for n in range(start, end)]
        total = torch.stack(each).sum(0) if each else torch.zeros(twin.table.dim)
        rows.append(total / max(1, end - start) if twin.table.pooling == "mean" else total)
    return torch.stack(rows)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_kind_optimizer_and_sharding_is_its_reference(ranks):
    cases = cases_of(ranks)
    by_rank = run_ranks(trained, ranks, cases, local_world_size=min(2, ranks))
    for i, case in enumerate(cases):
        check(case, [of_rank[i] for of_rank in by_rank])


def check(case: Case, found: list[dict[str, Any]]) -> None:
    dims = {t.name: t.dim for t in physical_tables(tables_of(case.sharding))}
    held = [entry for of_rank in found for entry in of_rank["held"]]
    cut = frozenset(name for name, what, _, _, w in held if what < 0 and w.shape[1] < dims[name])
    assert cut or case.sharding not in ("column_wise", "grid_shard") or len(found) < 4, case
    outputs, rows, (parts, states), dense, twin = expected(case.optimizer, case.weighted, cut)
    near = {"rtol": 1e-4, "atol": 2e-5}
    for step, output_BX in enumerate(outputs):
        ours_BX = torch.cat([of_rank["outputs"][step] for of_rank in found])
        torch.testing.assert_close(ours_BX, output_BX, **near, msg=lambda m, s=step: f"{case}, step {s}: {m}")
    seen = {name: torch.zeros_like(weight) for name, weight in rows.items()}
    for name, what, row, column, ours in held:
        where = f"{case}: table {name}, {'rows' if what < 0 else f'state {what}'} from {row}, {column}"
        if what < 0:
            theirs = rows[name].detach()[row : row + len(ours), column : column + ours.shape[1]]
            seen[name][row : row + len(ours), column : column + ours.shape[1]] = 1
        else:
            (k,) = (k for k, part in enumerate(parts[name]) if (part.start or 0) == column)
            theirs = states[name][k][what][row : row + len(ours)].view(ours.shape)
        torch.testing.assert_close(ours, theirs, **near, msg=lambda m, w=where: f"{w}: {m}")
    assert all(bool(cells.all()) for cells in seen.values()), case
    for of_rank in found:
        for name, parameter in of_rank["dense"].items():
            torch.testing.assert_close(parameter, dense[name].detach(), **near, msg=lambda m: f"{case}: {m}")
    assert {id for of_rank in found for id in of_rank["given"]} == {None, *twin.seen} and twin.defaulted, case
    for of_rank in found:
        for id, (ours, *of_row) in of_rank["given"].items():
            torch.testing.assert_close(ours, twin.rows[id], **near, msg=lambda m, i=id: f"{case}: id {i}: {m}")
            theirs = list(twin.states[id].values()) if id in twin.states else [torch.zeros_like(s) for s in of_row]
            for ours, state in zip(of_row, theirs, strict=True):
                torch.testing.assert_close(ours, state.view(-1), **near, msg=lambda m, i=id: f"{case}: id {i}: {m}")
