"""Logical tables -> one sharded look-up.

    build_embeddings(tables=..., features=...) -> Embeddings      on the meta device
    Embeddings.forward(ids: KJT) -> emb_BX                        one pooled vector per feature, in feature order

    ids -> id map -> EmbeddingBagCollection (all-to-all, fused look-up, all-to-all) -> combine -> mean -> emb_BX

Every table is lowered by its kind (sharding/tables/base.py) to physical tables of one EmbeddingBagCollection.  What
stands before and after it is written so that TrainPipelineSparseDist's tracing finds the collection and starts its
all-to-all a batch ahead: `id_map` is a module without parameters, and only `forward` itself is traced.

A kind's `combine` gets sums over the ids of a bag, also for pooling "mean", which is applied to what it gives.

FBGEMM's kernels want column counts that are multiples of 4, so a physical table is stored `stored_dim(D)` wide; the
added columns are zero, get zero gradients and are cut off again.  (The one effect: row-wise Adagrad's mean over a row
of D columns is taken over the stored ones.)

Shapes: B rows, F features, D dim of a feature, X sum of the dims, N ids.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from kernels import registry
from kernels.errors import UserError
from sharding.tables.base import Lowered, Source, Table


def stored_dim(dim: int) -> int:
    """Columns a physical table of this dim is stored with: 1 .. 4 -> 4, 5 .. 8 -> 8."""
    return -(-dim // 4) * 4


def lower(table: Table) -> Lowered:
    """What the table's kind makes of it."""
    return registry.load("sharding.tables", table.kind).lower(table)


def physical_tables(tables: Sequence[Table]) -> tuple[Table, ...]:
    """The physical tables of all logical ones, in order; UserError for a name that cannot be, or is there twice."""
    found: dict[str, Table] = {}
    for physical in (physical for table in tables for physical in lower(table).tables):
        name = physical.name
        if name in found:
            raise UserError(f"two tables are named {name!r}; a table's name must be unique: rename one")
        if not name or "." in name or "/" in name:
            raise UserError(f"table {name!r}: a table's name may not be empty or hold '.' or '/'; rename it")
        found[name] = physical
    return tuple(found.values())


def build_embeddings(
    *, tables: Sequence[Table], features: Sequence[str], device: str | torch.device = "meta"
) -> "Embeddings":
    """The look-up of all tables, not sharded yet.

    tables: logical tables; together they hold every feature once.
    features: the order of the features' vectors in `emb_BX`; the ids' KJT may have another order and more keys.
    Raises UserError when a feature has no table, or two.
    """
    owner: dict[str, Table] = {}
    for table in tables:
        for feature in table.features:
            if feature in owner:
                raise UserError(
                    f"feature {feature!r} looks up in two tables, {owner[feature].name!r} and {table.name!r}; "
                    f"give it to one of them"
                )
            owner[feature] = table
    for feature in features:
        if feature not in owner:
            raise UserError(f"feature {feature!r} has no table; {registry.nearest(feature, sorted(owner))}")
    return Embeddings(tables, features, device=torch.device(device))


class Embeddings(nn.Module):
    """See the file's docstring.

    tables, features: as given.  dims: D of each feature, in feature order.
    physical: the physical tables, in the collection's order.  logical: name of a physical table -> its logical table.
    ebc: the EmbeddingBagCollection, replaced by its sharded form in sharding/parallelize.py.
    """

    def __init__(self, tables: Sequence[Table], features: Sequence[str], *, device: torch.device) -> None:
        super().__init__()
        self.tables, self.features = tuple(tables), tuple(features)
        self.physical = physical_tables(tables)
        self.logical: dict[str, Table] = {}
        dim_of = {feature: table.dim for table in tables for feature in table.features}
        self.dims = tuple(dim_of[feature] for feature in features)
        sources: dict[str, Source] = {}
        combines: dict[str, nn.Module] = {}
        for table in tables:
            lowered = lower(table)
            self.logical |= {physical.name: table for physical in lowered.tables}
            sources |= lowered.sources
            if lowered.combine is not None:
                combines |= dict.fromkeys(table.features, lowered.combine)
        self.id_map = None if all(_same(name, source) for name, source in sources.items()) else IdMap(sources)
        self.ebc = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=t.name,
                    num_embeddings=t.rows,
                    embedding_dim=stored_dim(t.dim),
                    feature_names=list(t.features),
                    pooling=PoolingType.SUM,
                )
                for t in self.physical
            ],
            device=device,
        )
        parts = {f: [name for name, source in sources.items() if source.feature == f] for f in features}
        width = {name: t.dim for t in self.physical for name in t.features}
        self.combine = Combine(parts, width, combines)
        means = {feature for table in tables if table.pooling == "mean" for feature in table.features}
        self.mean = Mean(self.features, self.dims, means) if means.intersection(features) else None

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        emb_BX = self.combine(self.ebc(ids if self.id_map is None else self.id_map(ids)))
        return emb_BX if self.mean is None else self.mean(emb_BX, ids)


def _same(name: str, source: Source) -> bool:
    return source.ids is None and source.feature == name


class IdMap(nn.Module):
    """KJT of logical features -> KJT of physical features: a bag keeps its length, an id becomes `source.ids(id)`.

    With f's bags [7] [] [3 9] and sources {"f#q": (f, id // 4), "f#r": (f, id % 4)}:
    f#q has the bags [1] [] [0 2], f#r has [3] [] [3 1].
    """

    def __init__(self, sources: dict[str, Source]) -> None:
        super().__init__()
        self.sources = sources

    def forward(self, ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
        of = ids.to_dict()
        values, lengths = [], []
        for source in self.sources.values():
            bags = of[source.feature]
            values.append(bags.values() if source.ids is None else source.ids(bags.values()))
            lengths.append(bags.lengths())
        return KeyedJaggedTensor(
            keys=list(self.sources), values=torch.cat(values), lengths=torch.cat(lengths), stride=ids.stride()
        )


class Combine(nn.Module):
    """Pooled vectors of the physical features, in whatever order the plan left them -> emb_BX in feature order."""

    def __init__(self, parts: dict[str, list[str]], width: dict[str, int], combines: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = parts  # feature -> its physical features
        self.width = width  # physical feature -> columns that are not padding
        self.kinds = nn.ModuleList(dict.fromkeys(combines.values()))
        self._kind = {feature: list(self.kinds).index(module) for feature, module in combines.items()}
        self._plain = [names[0] for names in parts.values()]
        self._is_plain = not combines and all(w == stored_dim(w) for w in width.values())

    def forward(self, pooled: KeyedTensor) -> Tensor:
        if self._is_plain:
            if pooled.keys() == self._plain:
                return pooled.values()
            return KeyedTensor.regroup([pooled], [self._plain])[0]
        of = pooled.to_dict()
        columns = []
        for feature, names in self.parts.items():
            vectors = [of[name][:, : self.width[name]] for name in names]
            columns.append(self.kinds[self._kind[feature]](vectors) if feature in self._kind else vectors[0])
        return torch.cat(columns, dim=1)


class Mean(nn.Module):
    """Sums -> means, for the features of tables with pooling "mean": emb_BX / ids in the bag; an empty bag stays zero.

    TorchRec's own mean is not used: with grid_shard it gives sums.
    """

    def __init__(self, features: Sequence[str], dims: Sequence[int], means: set[str]) -> None:
        super().__init__()
        self.features = tuple(features)
        self.is_mean = [feature in means for feature in features]
        self.dims = tuple(dims)

    def forward(self, emb_BX: Tensor, ids: KeyedJaggedTensor) -> Tensor:
        position = {key: i for i, key in enumerate(ids.keys())}
        lengths_FB = ids.lengths().view(len(position), -1)
        ones_B = torch.ones(lengths_FB.shape[1], device=emb_BX.device)
        scale_FB = torch.stack(
            [
                1.0 / lengths_FB[position[feature]].clamp(min=1) if is_mean else ones_B
                for feature, is_mean in zip(self.features, self.is_mean, strict=True)
            ]
        )
        dims = torch.tensor(self.dims, device=emb_BX.device)
        return emb_BX * scale_FB.T.repeat_interleave(dims, dim=1, output_size=emb_BX.shape[1])
