"""The sharded look-up of tables whose rows are given to 64-bit ids as they come.

    ByIdSharder(backend=..., optimizer=..., ...)   for DistributedModelParallel, of embeddings.py's ByIdCollection
    figures(task)                                  of every table: ids with rows, and what has happened to them
    id_map_choices(task)                           which kernels of kernels/id_maps/ the tables have, and why

    ids -> to the rank that has their part (row_wise: by hash; table_wise: the table's rank) -> id map -> rows -> fused
    look-up -> back, as for any other table

The id map runs where the look-up runs, in the forward: once per batch and in the order of the batches, also where the
ids of the next batch are on their way already.  With gradients it admits, expires and evicts (`IdMap.admit`), without
it only looks (`IdMap.find`), and ids that have no row read row 0.  It is on the device of the table.

Row 0 of each rank's rows is its copy of the table's one default row.  In a row_wise table on several ranks each rank
sees its own ids of those that share it, so there row 0 is left out of the fused look-up and update: it is added as a
tensor of its own, the ranks add up its gradients after the backward, and all make the same update (`after_backward`).

Clocks count forwards with gradients, from 1; they are part of the map's state.

Shapes: N ids of a call, K ids that get a row in it, B bags of a feature, F features, T tables of a kernel, E rows,
D columns, X columns of all features.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.dist_data import KJTAllToAll
from torchrec.distributed.embedding_sharding import BaseSparseFeaturesDist
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.types import Awaitable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from kernels.id_map import IdMap, owner_of
from kernels.id_maps.base import Counts, Policy
from kernels.int8 import quantise
from kernels.row_counts import add_once
from sharding.compute_kernel import FusedEmbeddingBag, KernelCollection, KernelLookup, KernelSharder
from sharding.embeddings import ByIdCollection
from sharding.initial_weights import default_row, fresh_rows
from sharding.tables.base import ById, Table

EXPIRY_CHECKS = 16  # in the time after which an id expires: so an id may stay 1/16 of it longer
ROW_WISE = "row_wise"


class ByIdSharder(KernelSharder):
    """tables, by_id: of the physical tables, by name.  seed: of initial weights.
    id_map: a backend of kernels/id_maps/, or "auto" for the fastest on the tables' device."""

    def __init__(
        self,
        *,
        tables: Mapping[str, Table],
        by_id: Mapping[str, ById],
        seed: int,
        id_map: str = "auto",
        **kernel: Any,
    ) -> None:
        super().__init__(**kernel)
        self.about = {"tables": tables, "by_id": by_id, "seed": seed, "id_map": id_map}

    @property
    def module_type(self) -> type[ByIdCollection]:
        return ByIdCollection

    def shard(self, module: Any, params: Any, env: Any, device: Any = None, module_fqn: Any = None) -> "ByIdSharded":
        return ByIdSharded(
            module,
            params,
            env,
            self.fused_params,
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
            backend=self.backend,
            optimizer=self.optimizer,
            output=self.output,
            about=self.about,
        )


class ByIdSharded(KernelCollection):
    """TorchRec's sharded collection, its row_wise tables cut by a hash of the ids, with id maps in its look-ups."""

    def __init__(self, *args: Any, about: dict[str, Any], **kwargs: Any) -> None:
        self._about = about
        super().__init__(*args, **kwargs)

    def create_embedding_bag_sharding(self, sharding_infos: Any, env: Any, device: Any = None, **kwargs: Any) -> Any:
        if sharding_infos[0].param_sharding.sharding_type == ROW_WISE:
            return _HashedRows(sharding_infos, env, device, qcomm_codecs_registry=kwargs["qcomm_codecs_registry"])
        return super().create_embedding_bag_sharding(sharding_infos, env, device, **kwargs)

    def _lookup(self, sharding: Any, **kwargs: Any) -> KernelLookup:
        ranks = self._env.world_size if isinstance(sharding, _HashedRows) else 1
        return _Lookup(about=self._about | {"rank": self._env.rank if ranks > 1 else 0, "ranks": ranks}, **kwargs)

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Any:
        if self._has_uninitialized_input_dist:  # TorchRec would warn, at the first batch, of ids beyond the rows
            self._create_input_dist(features.keys())
            self._has_uninitialized_input_dist = False
        return super().input_dist(ctx, features)

    @property
    def kernels(self) -> list["ByIdBag"]:
        """On this rank, in the same order on every one."""
        # _lookups is a plain list, which modules() does not see.
        return [kernel for lookup in self._lookups for kernel in lookup.modules() if isinstance(kernel, ByIdBag)]

    def after_backward(self) -> None:
        for kernel in self.kernels:
            kernel.after_backward()


class _HashedRows(RwPooledEmbeddingSharding):
    def create_input_dist(self, device: torch.device | None = None) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        return ToOwners(self._pg, self._get_num_features())


class ToOwners(BaseSparseFeaturesDist[KeyedJaggedTensor]):
    """Every id, as it is, to the rank that has its part."""

    def __init__(self, pg: dist.ProcessGroup, features: int) -> None:
        super().__init__()
        self.ranks = pg.size()
        self._dist = KJTAllToAll(pg=pg, splits=[features] * self.ranks)

    def forward(self, ids: KeyedJaggedTensor) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        return self._dist(by_owner(ids, ranks=self.ranks))


def by_owner(ids: KeyedJaggedTensor, *, ranks: int) -> KeyedJaggedTensor:
    """The features once for each rank, with the ids that it owns.

    f's bags [7] [] [3 9] where rank 0 owns 3 and 7, rank 1 owns 9: f has [7] [] [3] for rank 0, [] [] [9] for rank 1.
    """
    values_N, lengths = ids.values().long(), ids.lengths().view(-1)
    owner_N = owner_of(values_N, ranks=ranks, seed=Policy.seed)
    bag_N = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths.long())
    counts = torch.bincount(owner_N * len(lengths) + bag_N, minlength=ranks * len(lengths))
    order_N = torch.argsort(owner_N, stable=True)
    weights_N = ids.weights_or_none()
    return KeyedJaggedTensor(
        keys=list(ids.keys()) * ranks,
        values=values_N[order_N],
        lengths=counts.to(lengths.dtype),
        weights=None if weights_N is None else weights_N[order_N],
        stride=ids.stride(),
    )


class _Lookup(KernelLookup):
    def __init__(self, *, about: dict[str, Any], **kwargs: Any) -> None:
        self._about = about
        super().__init__(**kwargs)

    def _create_embedding_kernel(self, config: GroupedEmbeddingConfig, device: Any, pg: Any, *_: Any) -> "ByIdBag":
        return ByIdBag(config, pg, device=device, about=self._about, **self._kernel)


class ByIdBag(FusedEmbeddingBag):
    """Our fused kernel with an id map for each of its tables.

    rows: a GivenRows for each table.  Its first forward pre-hook turns ids into rows, so that hooks after it, those of
    a delta checkpoint, see rows.
    """

    def __init__(self, config: GroupedEmbeddingConfig, pg: Any, *, about: dict[str, Any], **kernel: Any) -> None:
        super().__init__(config, pg, **kernel)
        states = self._emb_module.split_optimizer_states() or [[]] * len(config.embedding_tables)
        scales = self.bags.state.scale_views or [None] * len(config.embedding_tables)
        self.rows = [
            GivenRows(
                about["tables"][one.name],
                about["by_id"][one.name],
                weights_ED=weights_ED,
                scales_E=scales_E,
                states=of_table,
                seed=about["seed"],
                rank=about["rank"],
                ranks=about["ranks"],
                id_map=about["id_map"],
            )
            for one, weights_ED, scales_E, of_table in zip(
                config.embedding_tables, self._emb_module.split_embedding_weights(), scales, states, strict=True
            )
        ]
        self._shares_default = about["ranks"] > 1
        self._defaults: list[Tensor] = []  # of the forward whose backward may still have to be finished
        self._defaulted_T = torch.zeros(len(self.rows), device=self.bags.state.device)
        self._fresh: list[tuple[GivenRows, Tensor, Tensor]] = []
        self.register_forward_pre_hook(ByIdBag._to_rows)

    def count(self, counts: Sequence[Tensor]) -> None:
        """Have the rows of each table counted in (E,) int32 (update_counts.py): from 0 when an id gets one."""
        for given, counts_E in zip(self.rows, counts, strict=True):
            given.counts_E = counts_E

    def updated_by(self, features: KeyedJaggedTensor) -> tuple[Tensor, list[int]]:
        """The rows that the backward of a call updates, and where each feature begins in them.

        Without the default rows where ranks share them: `after_backward` updates these.
        """
        rows_N, ends = features.values(), features.offset_per_key()
        if not self._shares_default:
            return rows_N, ends
        own_N = rows_N != 0
        before = nn.functional.pad(own_N.cumsum(0), (1, 0))
        return rows_N[own_N], before[torch.tensor(ends)].tolist()

    def _to_rows(self, inputs: tuple[KeyedJaggedTensor, ...]) -> tuple[KeyedJaggedTensor, ...]:
        ids, training = inputs[0], torch.is_grad_enabled()
        if training:
            self.after_backward()
        found, ends, of_feature = [], ids.offset_per_key(), self.bags.spec.features_of
        for given, features in zip(self.rows, of_feature, strict=True):
            assert features == tuple(range(features[0], features[-1] + 1)), "a table's features stand side by side"
            ids_N = ids.values()[ends[features[0]] : ends[features[-1] + 1]].long()
            if not training:
                found.append(given.map.find(ids_N))
                continue
            admitted = given.admit(ids_N)
            found.append(admitted.rows_N)
            self._fresh.append((given, admitted.new_ids_K, admitted.new_rows_K))
        rows = KeyedJaggedTensor(
            keys=ids.keys(),
            values=torch.cat(found),
            lengths=ids.lengths(),
            offsets=ids.offsets(),
            weights=ids.weights_or_none(),
            stride=ids.stride(),
        )
        return (rows, *inputs[1:])

    def forward(self, features: KeyedJaggedTensor, *args: Any, **kwargs: Any) -> Tensor:
        for given, ids_K, rows_K in self._fresh:
            given.begin(ids_K, rows_K)
        self._fresh = []
        if not (self._shares_default and torch.is_grad_enabled()):
            return super().forward(features, *args, **kwargs)
        rows_N, offsets, weights_N = features.values(), features.offsets(), features.weights_or_none()
        own_N = rows_N != 0
        device = rows_N.device
        bag_N = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=device), offsets.diff())
        ones_N = torch.ones(len(rows_N), device=device) if weights_N is None else weights_N
        count_FB = torch.zeros(len(offsets) - 1, device=device).index_add_(0, bag_N[~own_N], ones_N[~own_N])
        count_FB = count_FB.view(len(self.bags.spec.features), -1)
        before = nn.functional.pad(own_N.cumsum(0), (1, 0))
        own_weights_N = weights_N[own_N] if self.bags.spec.weighted else None
        emb_BX = self.bags(rows_N[own_N], before[offsets], own_weights_N)
        self._defaults = [self.bags.state.read(t, slice(1))[0].requires_grad_() for t in range(len(self.rows))]
        ends = features.offset_per_key()
        per_table = [(fs[0], fs[-1] + 1) for fs in self.bags.spec.features_of]
        self._defaulted_T = torch.stack([(~own_N[ends[a] : ends[b]]).sum() for a, b in per_table]).float()
        of_feature = [self._defaults[t] for t in self.bags.spec.features]
        shared = [count_B[:, None] * row_D for count_B, row_D in zip(count_FB, of_feature, strict=True)]
        return emb_BX + torch.cat(shared, dim=1).to(emb_BX.dtype)

    @torch.no_grad()
    def after_backward(self) -> None:
        """The same update of the default rows on every rank, from the sum of the gradients that the ranks have of them.

        All ranks together; nothing where it has been done.  A table whose default row no rank has read is left alone.
        """
        if not self._defaults:
            return
        spec, defaults = self.bags.spec, self._defaults
        self._defaults = []
        gradients = [torch.zeros_like(row_D) if row_D.grad is None else row_D.grad for row_D in defaults]
        summed = torch.cat([self._defaulted_T, *gradients])
        dist.all_reduce(summed, group=self._pg)
        read_T, *gradients = summed.split([len(defaults), *(len(row_D) for row_D in defaults)])
        device = summed.device
        grad_X, lengths_F = torch.zeros(1, spec.columns[-1], device=device), [0] * len(spec.features)
        for (first, *_), grad_D, read in zip(spec.features_of, gradients, read_T.tolist(), strict=True):
            grad_X[0, spec.columns[first] : spec.columns[first + 1]] = grad_D
            lengths_F[first] = int(read > 0)
        if not any(lengths_F):
            return
        for given, read in zip(self.rows, read_T.tolist(), strict=True):
            if read and given.counts_E is not None:
                add_once(given.counts_E, torch.zeros(1, dtype=torch.int64, device=device))
        ids_N = torch.zeros(sum(lengths_F), dtype=torch.int64, device=device)
        offsets = torch.tensor([0, *accumulate(lengths_F)], device=device)
        weights_N = torch.ones(len(ids_N), device=device) if spec.weighted else None
        self.bags.state.step -= 1  # a part of the update that the backward has counted already
        self.bags.kernel.backward_update(grad_X.to(spec.output), ids_N, offsets, weights_N, weights_grad=False)


class GivenRows:
    """The rows of one table on this rank: their id map, when they expire, and what they begin with.

    map: the IdMap.  weights_ED, scales_E, states: views of what the kernel holds; row 0 is the default row.  scales_E:
    of rows of int8.
    rank, ranks: among those that share the table: 0 of 1 where one has all of it.
    id_map: its backend.
    """

    def __init__(
        self,
        table: Table,
        by_id: ById,
        *,
        weights_ED: Tensor,
        states: list[Tensor],
        scales_E: Tensor | None = None,
        seed: int,
        rank: int,
        ranks: int,
        id_map: str = "auto",
    ) -> None:
        self.table, self.by_id, self.seed, self.states = table, by_id, seed, states
        self.weights_ED, self.scales_E, self.rank, self.ranks = weights_ED.detach(), scales_E, rank, ranks
        self.counts_E: Tensor | None = None  # int32, in how many steps a row was updated, where somebody counts
        self.map = IdMap(
            by_id.policy, rank=rank, ranks=ranks, name=table.name, backend=id_map, device=weights_ED.device
        )
        assert len(weights_ED) > self.map.limit
        self.age = Age(by_id)

    @torch.no_grad()
    def start(self) -> None:
        """The default row's initial weights; the others are written when they are given."""
        self.weights_ED[0].zero_()
        row_D = default_row(self.table, seed=self.seed).to(self.weights_ED.device)
        self._write(torch.zeros(1, dtype=torch.int64, device=row_D.device), row_D[None])

    def admit(self, ids_N: Tensor) -> Any:
        """The rows of a training batch: see kernels.id_map.IdMap.admit."""
        clock = self.map.clock + 1
        before = self.age.before(clock)
        if before is not None:
            self.map.expire(before=before)
        return self.map.admit(ids_N, clock=clock)

    @torch.no_grad()
    def begin(self, ids_K: Tensor, rows_K: Tensor) -> None:
        """Rows as their ids find them: initial weights, states of zero, never updated."""
        if len(rows_K):
            self._write(rows_K, fresh_rows(self.table, ids_K, seed=self.seed))
            for state in self.states:
                state.index_fill_(0, rows_K, 0.0)
            if self.counts_E is not None:
                self.counts_E.index_fill_(0, rows_K, 0)

    def _write(self, rows_K: Tensor, values_KD: Tensor) -> None:
        if self.scales_E is not None:
            values_KD, scale_K = quantise(values_KD)
            self.scales_E.index_copy_(0, rows_K, scale_K)
        self.weights_ED[:, : self.table.dim].index_copy_(0, rows_K, values_KD.to(self.weights_ED.dtype))


class Age:
    """When ids expire.

    before(clock): at a time for a check the clock at which an id must have been seen to keep its row, else None.
    For hours, `marks` are (clock, seconds of training until then), the last one at most 1/16 of the time ago.
    """

    def __init__(self, by_id: ById) -> None:
        self.steps, self.hours = by_id.expire_steps, by_id.expire_hours
        self.marks: list[tuple[int, float]] = []
        self.now = time.monotonic
        self._started: float | None = None
        self._until_then = 0.0  # seconds of training before this process

    @property
    def seconds(self) -> float:
        """Of training since the run began, without the times at which it stood still."""
        return self._until_then + (0.0 if self._started is None else self.now() - self._started)

    def before(self, clock: int) -> int | None:
        if self.steps is not None:
            due = clock % max(1, self.steps // EXPIRY_CHECKS) == 0
            return clock - self.steps if due and clock > self.steps else None
        if self.hours is None:
            return None
        if self._started is None:
            self._started = self.now()
        limit, seconds = 3600 * self.hours, self.seconds
        if self.marks and seconds - self.marks[-1][1] < limit / EXPIRY_CHECKS:
            return None
        self.marks.append((clock, seconds))
        old = [at for at, then in self.marks if seconds - then >= limit]
        self.marks = [mark for mark in self.marks if not old or mark[0] >= old[-1]]
        return old[-1] if old else None

    def state(self) -> Tensor:
        """(1 + marks, 2) float64: the seconds so far, and the marks."""
        return torch.tensor([(0.0, self.seconds), *self.marks], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        (_, self._until_then), *marks = state.tolist()
        self.marks = [(int(clock), seconds) for clock, seconds in marks]
        self._started = None


def id_map_choices(embeddings: nn.Module) -> dict[str, str]:
    """Which backends this rank's id maps have, and why; none where there are no such tables."""
    if not embeddings.by_id:
        return {}
    choices = (given.map.choice for kernel in embeddings.ebc_by_id.kernels for given in kernel.rows)
    return {choice.name: choice.why for choice in choices}


def figures(embeddings: nn.Module) -> dict[str, dict[str, int]]:
    """Of each table, over all ranks: limit, ids (that have rows now), rows (the most there ever were), and what has
    happened since the run began: occurrences, defaulted (of them read the default row), admitted, expired, evicted.

    All ranks together.  embeddings: sharding.embeddings.Embeddings, sharded.
    """
    names = list(embeddings.by_id)
    if not names:
        return {}
    keys = ("ids", "rows", *(one.name for one in fields(Counts)))
    sums = torch.zeros(len(names), len(keys), dtype=torch.int64)
    for given in (given for kernel in embeddings.ebc_by_id.kernels for given in kernel.rows):
        values = (given.map.size, given.map.top, *vars(given.map.counts).values())
        sums[names.index(given.table.name)] = torch.tensor(values)
    dist.all_reduce(sums)
    limits = ({"limit": embeddings.by_id[name].policy.limit} for name in names)
    return {
        name: limit | dict(zip(keys, row, strict=True))
        for name, limit, row in zip(names, limits, sums.tolist(), strict=True)
    }
