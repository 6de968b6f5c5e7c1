"""Logical tables -> one sharded look-up.

    build_embeddings(tables=..., features=...) -> Embeddings      on the meta device
    Embeddings.forward(ids: KJT) -> emb_BX                        one pooled vector per feature, in feature order

    ids -> id map -> EmbeddingBagCollection (all-to-all, fused look-up, all-to-all) -> combine -> mean -> emb_BX

Every table is lowered by its kind (sharding/tables/base.py) to physical tables of one EmbeddingBagCollection, `ebc`.
What stands before and after it is written so that TrainPipelineSparseDist's tracing finds the collection and starts its
all-to-all a batch ahead: `id_map` is a module without parameters, and only `forward` itself is traced.

A kind's `combine` gets sums over the ids of a bag, also for pooling "mean", which is applied to what it gives.  Where
it does not commute with the sum (`per_id`), its physical tables stand in a second collection, `ebc_per_id`, for which
every id is a bag of its own (`spread`); the combine's results are weighted and summed over the bag here.  Bags of one
id need none of this: without multi-hot features such a table is in `ebc` like any other.

A kind whose rows are given to ids as they come (`by_id`) has its tables in a third collection, `ebc_by_id`, whose ids
travel as they are and become rows where their id map is (sharding/by_id.py).

FBGEMM's kernels want column counts that are multiples of 4, so a physical table is stored `stored_dim(D)` wide; the
added columns are zero, get zero gradients and are cut off again.  (The one effect: row-wise Adagrad's mean over a row
of D columns is taken over the stored ones.)

Shapes: B rows, F features, D dim of a feature, X sum of the dims, N ids of a feature.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from kernels import registry
from kernels.errors import UserError
from sharding.tables.base import ById, Lowered, Source, Table, stored_dim

DATA_TYPES = {"fp32": DataType.FP32, "bf16": DataType.BF16, "fp16": DataType.FP16, "int8": DataType.INT8}


def lower(table: Table) -> Lowered:
    """What the table's kind makes of it.  UserError where that cannot be pooled."""
    lowered = registry.load("sharding.tables", table.kind).lower(table)
    if lowered.by_id is not None and (lowered.per_id or lowered.combine is not None or len(lowered.tables) != 1):
        raise UserError(
            f"table {table.name!r}: kind {table.kind!r} gives rows to ids (by_id) and lowers to {len(lowered.tables)} "
            f"tables{' with a combine' if lowered.combine is not None else ''}{' per id' if lowered.per_id else ''}: "
            f"rows given to ids are pooled as they are (pooling = {table.pooling!r}), from one table; leave out "
            "combine and per_id, or map the ids without by_id"
        )
    if lowered.per_id and lowered.combine is None:
        raise UserError(
            f"table {table.name!r}: kind {table.kind!r} says per_id, that its vectors are combined before they are "
            f"pooled (pooling = {table.pooling!r}), and has no combine; give one, or leave per_id out"
        )
    return lowered


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
    *,
    tables: Sequence[Table],
    features: Sequence[str],
    weighted: bool = False,
    device: str | torch.device = "meta",
) -> "Embeddings":
    """The look-up of all tables, not sharded yet.

    tables: logical tables; together they hold every feature once.
    features: the order of the features' vectors in `emb_BX`; the ids' KJT may have another order and more keys.
    weighted: whether the ids' KJT has a weight for each id, by which its vector is multiplied before the sum.
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
    return Embeddings(tables, features, weighted=weighted, device=torch.device(device))


class Embeddings(nn.Module):
    """See the file's docstring.

    tables, features: as given.  dims: D of each feature, in feature order.
    physical: the physical tables.  logical: name of a physical table -> its logical table.
    sources: physical feature -> its Source.  tables_per_id: names of the physical tables in `ebc_per_id`.
    by_id: name of a physical table whose rows are given to ids -> how.
    ebc, ebc_per_id, ebc_by_id: the EmbeddingBagCollections, replaced by their sharded forms in sharding/parallelize.py;
        None where no table is looked up that way.  collections: those there are.
    """

    def __init__(
        self, tables: Sequence[Table], features: Sequence[str], *, weighted: bool, device: torch.device
    ) -> None:
        super().__init__()
        self.tables, self.features = tuple(tables), tuple(features)
        self.physical = physical_tables(tables)
        dim_of = {feature: table.dim for table in tables for feature in table.features}
        self.dims = tuple(dim_of[feature] for feature in features)
        lowered = {table.name: lower(table) for table in tables}
        _check_names(lowered)
        self.logical: dict[str, Table] = {p.name: table for table in tables for p in lowered[table.name].tables}
        alone = {t.name for t in tables if lowered[t.name].per_id and (t.multi_hot or weighted)}
        by_id = [t for t in tables if lowered[t.name].by_id is not None]
        rest = [t for t in tables if lowered[t.name].by_id is None]
        pooled, per_id = [[t for t in rest if (t.name in alone) is wanted] for wanted in (False, True)]
        sources = {name: s for t in pooled for name, s in lowered[t.name].sources.items()}
        sources_per_id = {name: s for t in per_id for name, s in lowered[t.name].sources.items()}
        self.sources = {**sources, **sources_per_id}
        for table in by_id:
            self.sources |= lowered[table.name].sources
        self.by_id: dict[str, ById] = {p.name: lowered[t.name].by_id for t in by_id for p in lowered[t.name].tables}
        self.tables_per_id = frozenset(p.name for t in per_id for p in lowered[t.name].tables)
        self.id_map = None if all(_same(name, source) for name, source in sources.items()) else IdMap(sources)
        self.ebc = _collection([p for t in pooled for p in lowered[t.name].tables], weighted=weighted, device=device)
        self.spread = Spread(sources_per_id) if sources_per_id else None
        self.ebc_per_id = _collection(
            [p for t in per_id for p in lowered[t.name].tables], weighted=False, device=device
        )
        self.ebc_by_id = _collection(
            [p for t in by_id for p in lowered[t.name].tables], weighted=weighted, device=device, of=ByIdCollection
        )
        with device:
            combines = nn.ModuleDict(
                # A prefix, since a ModuleDict takes no key that is a name of its own, such as "keys".
                {f"of_{name}": low.combine for name, low in lowered.items() if low.combine is not None}
            )
        self.combine = Combine(
            parts={f: [name for name, source in self.sources.items() if source.feature == f] for f in features},
            width={name: t.dim for t in self.physical for name in t.features},
            combines=combines,
            combine_of={f: f"of_{t.name}" for t in tables if f"of_{t.name}" in combines for f in t.features},
            per_id={f for t in per_id for f in t.features},
        )
        means = {feature for table in tables if table.pooling == "mean" for feature in table.features}
        self.mean = Mean(self.features, self.dims, means) if means.intersection(features) else None

    @property
    def collections(self) -> tuple[nn.Module, ...]:
        return tuple(c for c in (self.ebc, self.ebc_per_id, self.ebc_by_id) if c is not None)

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        pooled = None if self.ebc is None else self.ebc(ids if self.id_map is None else self.id_map(ids))
        each = None if self.ebc_per_id is None else self.ebc_per_id(self.spread(ids))
        given = None if self.ebc_by_id is None else self.ebc_by_id(ids)
        emb_BX = self.combine(pooled, each, given, ids)
        return emb_BX if self.mean is None else self.mean(emb_BX, ids)

    def after_backward(self) -> None:
        """What is left to do to the tables between a backward and the next forward, a checkpoint or an evaluation."""
        if self.ebc_by_id is not None:
            self.ebc_by_id.after_backward()


def _check_names(lowered: Mapping[str, Lowered]) -> None:
    """UserError where the features of two tables become one physical feature: "f" in two parts has "f#0" and "f#1"."""
    owner: dict[str, tuple[str, str]] = {}
    for table, low in lowered.items():
        for name, source in low.sources.items():
            if name in owner:
                feature, other = owner[name]
                raise UserError(
                    f"features {feature!r} of table {other!r} and {source.feature!r} of table {table!r} would both be "
                    f"looked up as {name!r}: parts of a feature are named like it, with '#' and a number; rename one"
                )
            owner[name] = (source.feature, table)


class ByIdCollection(EmbeddingBagCollection):
    """The tables whose rows are given to ids: a class of its own, since it has a sharder of its own."""


def _collection(
    tables: Sequence[Table],
    *,
    weighted: bool,
    device: torch.device,
    of: type[EmbeddingBagCollection] = EmbeddingBagCollection,
) -> EmbeddingBagCollection | None:
    if not tables:
        return None
    return of(
        tables=[
            EmbeddingBagConfig(
                name=t.name,
                num_embeddings=t.rows,
                embedding_dim=stored_dim(t.dim),
                feature_names=list(t.features),
                pooling=PoolingType.SUM,
                data_type=DATA_TYPES[t.row_type],
                init_fn=_left_alone,
            )
            for t in tables
        ],
        is_weighted=weighted,
        device=device,
    )


def _left_alone(weights: Tensor) -> None:
    """sharding/initial_weights.py draws the values; TorchRec would draw others first, and cannot for int8."""


def _same(name: str, source: Source) -> bool:
    return source.ids is None and source.keep is None and source.feature == name


class IdMap(nn.Module):
    """KJT of logical features -> KJT of physical features: an id becomes `source.ids(id)`, or is left out of its bag.

    With f's bags [7] [] [3 9] and sources {"f#q": (f, id // 4), "f#r": (f, id % 4)}:
    f#q has the bags [1] [] [0 2], f#r has [3] [] [3 1]; with keep = id > 4 f#q has [1] [] [2].
    """

    def __init__(self, sources: dict[str, Source]) -> None:
        super().__init__()
        self.sources = sources

    def forward(self, ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
        of = ids.to_dict()
        values, lengths, weights = [], [], []
        for source in self.sources.values():
            bags = of[source.feature]
            ids_N, weights_N, lengths_B = bags.values(), bags.weights_or_none(), bags.lengths()
            if source.keep is not None:
                kept_N = source.keep(ids_N)
                before = nn.functional.pad(kept_N.cumsum(0), (1, 0))
                lengths_B = before[bags.offsets()].diff().to(lengths_B.dtype)
                ids_N, weights_N = ids_N[kept_N], None if weights_N is None else weights_N[kept_N]
            values.append(ids_N if source.ids is None else source.ids(ids_N))
            lengths.append(lengths_B)
            weights.append(weights_N)
        return KeyedJaggedTensor(
            keys=list(self.sources),
            values=torch.cat(values),
            lengths=torch.cat(lengths),
            weights=None if weights[0] is None else torch.cat(weights),
            stride=ids.stride(),
        )


class Spread(nn.Module):
    """KJT of logical features -> KJT of physical features in which every id is a bag of its own.

    All features of a KJT have as many bags, so bags without ids follow: as many as the longest feature needs, on the
    rank that needs most, since the ranks' exchanges are of equal parts.

    With f's bags [7] [] [3 9], g's [5] [] [] and the sources {"f#q": (f, id // 4), "g#q": (g, id // 4)}:
    f#q has the bags [1] [0] [2], g#q has [1] [] [].
    """

    def __init__(self, sources: dict[str, Source]) -> None:
        super().__init__()
        self.sources = sources

    def forward(self, ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
        of = ids.to_dict()
        features = {source.feature for source in self.sources.values()}
        bags = _largest_of_ranks(max(1, *(of[feature].values().numel() for feature in features)))
        values, lengths = [], []
        for source in self.sources.values():
            ids_N = of[source.feature].values()
            lengths_N = torch.ones_like(ids_N) if source.keep is None else source.keep(ids_N).to(ids_N.dtype)
            if source.keep is not None:
                ids_N = ids_N[lengths_N.bool()]
            values.append(ids_N if source.ids is None else source.ids(ids_N))
            lengths.append(nn.functional.pad(lengths_N, (0, bags - len(lengths_N))))
        return KeyedJaggedTensor(
            keys=list(self.sources), values=torch.cat(values), lengths=torch.cat(lengths), stride=bags
        )


def _largest_of_ranks(number: int) -> int:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


class Combine(nn.Module):
    """Vectors of the physical features, in whatever order the plan left them -> emb_BX in feature order.

    parts: feature -> its physical features.  width: physical feature -> columns that are not padding.
    combine_of: feature -> its module in `combines`.  per_id: features whose vectors are of ids, not of bags.
    """

    def __init__(
        self,
        *,
        parts: dict[str, list[str]],
        width: dict[str, int],
        combines: nn.ModuleDict,
        combine_of: dict[str, str],
        per_id: set[str],
    ) -> None:
        super().__init__()
        self.parts, self.width = parts, width
        self.combines, self.combine_of, self.per_id = combines, combine_of, per_id
        self._plain = [names[0] for names in parts.values()]
        self._is_plain = not combine_of and all(w == stored_dim(w) for w in width.values())

    def forward(
        self,
        pooled: KeyedTensor | None,
        each: KeyedTensor | None,
        given: KeyedTensor | None,
        ids: KeyedJaggedTensor,
    ) -> Tensor:
        collections = [found for found in (pooled, each, given) if found is not None]
        if self._is_plain and len({found.values().dtype for found in collections}) == 1:
            if len(collections) == 1 and collections[0].keys() == self._plain:
                return collections[0].values()
            return KeyedTensor.regroup(collections, [self._plain])[0]
        of = {name: vectors for found in collections for name, vectors in found.to_dict().items()}
        bags = ids.to_dict() if self.per_id else {}
        columns = []
        for feature, names in self.parts.items():
            vectors = [of[name][:, : self.width[name]] for name in names]
            if feature in self.per_id:
                vectors = [vector[: bags[feature].values().numel()] for vector in vectors]
            if feature in self.combine_of:  # in float32, also where the look-ups give bfloat16
                one = self.combines[self.combine_of[feature]]([vector.float() for vector in vectors])
            else:
                one = vectors[0]
            columns.append(_sum_bags(one, bags[feature]) if feature in self.per_id else one)
        return torch.cat(columns, dim=1)


def _sum_bags(each_ND: Tensor, bags: JaggedTensor) -> Tensor:
    """(N, D) vectors of the ids -> (B, D), each times its id's weight, summed over its bag; zeros for an empty bag."""
    weights_N = bags.weights_or_none()
    if weights_N is not None:
        each_ND = each_ND * weights_N[:, None]
    if not len(each_ND):  # segment_reduce refuses it; the product keeps the look-up in the graph on every rank
        return each_ND.new_zeros(len(bags.lengths()), each_ND.shape[1]) + each_ND.sum()
    return torch.segment_reduce(each_ND, "sum", lengths=bags.lengths().long(), axis=0, unsafe=True, initial=0.0)


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
