"""From config and dataset to tables: defaults, then every override whose pattern matches, the last one winning."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from kernels import registry
from kernels.errors import UserError
from sharding.tables.base import Table
from trainer.config import Config, TableOverride
from trainer.data.dataset import Categorical, Dataset


@dataclass(frozen=True, kw_only=True)
class ResolvedTables:
    """tables: in the order of their first feature. rows, policy: by feature.

    any_id: features whose ids are any 64 bits, since an id map gives them rows.
    """

    tables: tuple[Table, ...]
    features: tuple[str, ...]  # in dataset order
    rows: dict[str, int]
    policy: dict[str, str]
    any_id: frozenset[str] = frozenset()

    @property
    def reader_rows(self) -> dict[str, int]:
        """By feature, what its ids are below, seen as unsigned numbers."""
        return {feature: 1 << 64 if feature in self.any_id else rows for feature, rows in self.rows.items()}

    @property
    def dims(self) -> tuple[int, ...]:
        """D of each feature, in feature order."""
        by_feature = {f: t.dim for t in self.tables for f in t.features}
        return tuple(by_feature[f] for f in self.features)


def resolve(config: Config, dataset: Dataset) -> ResolvedTables:
    """The tables of this config on this dataset.

    A feature has a table of its own name, unless an override gives several features one table: that has the rows of
    its largest feature and must be given the same options by all of them.
    Raises UserError when there is no feature, a pattern matches none, or sharing features disagree, naming them.
    """
    features = dataset.feature_names
    if not features:
        raise UserError(f"dataset {dataset.name!r} has no categorical features, so there is no table to train")
    for i, override in enumerate(config.tables.override):
        for pattern in _patterns(override):
            if not any(fnmatchcase(f, pattern) for f in features):
                raise UserError(
                    f"tables.override[{i}].match = {pattern!r} matches no feature of dataset {dataset.name!r}; "
                    + registry.nearest(pattern, list(features))
                )
    drafts: dict[str, list[tuple[Categorical, dict]]] = {}
    for feature in dataset.categorical:
        options = _options(config, feature)
        drafts.setdefault(options.pop("table") or feature.name, []).append((feature, options))
    tables: list[Table] = []
    rows: dict[str, int] = {}
    policy: dict[str, str] = {}
    for name, members in drafts.items():
        table = _table(name, members)
        if table.rows < 1:
            raise UserError(
                f"table {name!r} has {table.rows} rows, the cardinality of feature {members[0][0].name!r} in dataset "
                f"{dataset.name!r}; a table has at least one: prepare the data again, or set rows in an override"
            )
        tables.append(table)
        for feature, options in members:
            rows[feature.name] = table.rows
            policy[feature.name] = options["id_policy"]
    settled = settle(tables)
    any_id = frozenset(feature for table in settled if _takes_any_id(table) for feature in table.features)
    for feature in dataset.categorical:
        if feature.ids == "hash64" and feature.name not in any_id and policy[feature.name] == "error":
            raise UserError(
                f"feature {feature.name!r}: its ids have 64 bits (it was prepared with ids = 'hash64'), and its table "
                f'has {rows[feature.name]:,} rows; give it kind = "collisionless", or fold its ids into the table '
                'with id_policy = "hash"'
            )
    return ResolvedTables(tables=settled, features=features, rows=rows, policy=policy, any_id=any_id)


def _takes_any_id(table: Table) -> bool:
    return registry.load("sharding.tables", table.kind).lower(table).by_id is not None


def settle(tables: Sequence[Table]) -> tuple[Table, ...]:
    """The tables, each kind asked what it makes of all of its own together (`together` in sharding/tables/base.py)."""
    settled = {table.name: table for table in tables}
    for kind in dict.fromkeys(table.kind for table in tables):
        module = registry.load("sharding.tables", kind)
        if hasattr(module, "together"):
            settled |= {t.name: t for t in module.together([t for t in tables if t.kind == kind])}
    return tuple(settled.values())


def overrides_of(tables: Sequence[Table]) -> tuple[TableOverride, ...]:
    """What a config says after its own overrides to have these tables in place of those it would have."""
    return tuple(
        TableOverride(
            match=table.features,
            kind=table.kind,
            options=table.options,
            row_type=table.row_type,
            table=table.name if len(table.features) > 1 else None,
        )
        for table in settle(tables)
    )


def with_overrides(config: Config, overrides: Sequence[TableOverride]) -> Config:
    """The config with these after its own."""
    tables = config.tables.model_copy(update={"override": (*config.tables.override, *overrides)})
    return config.model_copy(update={"tables": tables})


def _table(name: str, members: list[tuple[Categorical, dict]]) -> Table:
    first_feature, first = members[0]
    for feature, options in members[1:]:
        for key, value in options.items():
            if key not in ("rows", "id_policy") and value != first[key]:
                raise UserError(
                    f"table {name!r}: feature {feature.name!r} asks for {key} = {value!r}, "
                    f"feature {first_feature.name!r} for {first[key]!r}; features that share a table need the same"
                )
    asked = {options["rows"] for _, options in members if options["rows"] is not None}
    if len(asked) > 1:
        raise UserError(f"table {name!r}: its features ask for {sorted(asked)} rows; give one number")
    return Table(
        name=name,
        rows=asked.pop() if asked else max(feature.cardinality for feature, _ in members),
        dim=first["dim"],
        features=tuple(feature.name for feature, _ in members),
        pooling=first["pooling"],
        sharding=first["sharding"],
        kind=first["kind"],
        options=first["options"],
        init_std=first["init_std"],
        row_type=first["row_type"],
        multi_hot=any(feature.multi_hot for feature, _ in members),
        **_frequencies([feature for feature, _ in members]),
    )


def _frequencies(features: Sequence[Categorical]) -> dict[str, Any]:
    """lookups, head and by_popularity of the table that these features share, as far as dataset.json tells.

    Which rows several features have in common is not known, so that a shared table has no head.
    """
    if any(feature.stats is None for feature in features):
        return {}
    found: dict[str, Any] = {"lookups": sum(feature.stats.ids_per_bag for feature in features)}
    if len(features) == 1:
        top = features[0].stats.top_share
        found["head"] = tuple(sorted((int(n), share) for n, share in top.items()))
        found["by_popularity"] = features[0].ids == "vocab"
    return found


def _options(config: Config, feature: Categorical) -> dict:
    defaults = config.tables
    options = {
        "rows": None,
        "dim": defaults.dim,
        "pooling": defaults.pooling,
        "sharding": defaults.sharding,
        "kind": defaults.kind,
        "options": {},
        "id_policy": config.data.id_policy,
        "init_std": None,
        "row_type": defaults.row_type,
        "table": None,
    }
    for override in defaults.override:
        if any(fnmatchcase(feature.name, pattern) for pattern in _patterns(override)):
            given = override.model_dump(exclude={"match"}, exclude_none=True)
            options.update(given)
    return options


def _patterns(override: TableOverride) -> tuple[str, ...]:
    return (override.match,) if isinstance(override.match, str) else override.match
