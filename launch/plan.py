"""`tablemesh plan`: where the tables of a config would go on a cluster, and what a step would take, without one.

make(config, ...) -> Asked       config, dataset and cluster turned into what the planner takes
answer(asked) -> dict            what --json prints; infeasible ones have the ways out
compare(asked, a, b) -> dict     two plans of the same tables side by side
launch/what_if.py                the same work on several clusters
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kernels import registry
from kernels.errors import UserError
from launch.ways_by_kind import ways_by_kind
from sharding import planner, topology
from sharding.bound import Options
from sharding.cost import Choice, Kind, Prices, load, price
from sharding.embeddings import Embeddings
from sharding.explain import explain, parts_of
from sharding.plan import check_can_be, describe_solution, rules_of
from sharding.plan_file import Placed, read
from sharding.planner import Infeasible, Limits, Rule, Solution
from sharding.simulate import Step, simulate
from sharding.tables.base import SHARDING_TYPES
from sharding.topology import Topology, quantity
from sharding.ways_out import MOST_RANKS, WayOut, memory_words, ways_out
from sharding.work import Work


@dataclass(frozen=True)
class Asked:
    """What is to be planned.  profiles: those beside the built-in ones.  again: the same on another cluster.

    with_tables: the same with these overrides (trainer.config.TableOverride) after the config's own.
    with_fbgemm: the same with FBGEMM's kernels; None where they are what it has, or lack what it asks for.
    """

    name: str
    work: Work
    cluster: Topology
    embeddings: Embeddings
    rules: Mapping[str, Rule]
    limits: Limits
    profiles: Mapping[str, Topology]
    again: Callable[[Topology], "Asked"]
    with_tables: Callable[[Sequence[Any]], "Asked"]
    with_fbgemm: Callable[[], "Asked"] | None

    def on(self, cluster: str) -> "Asked":
        """The same on another cluster.  UserError where a table's own sharding does not fit it."""
        return self.again(topology.parse(cluster, self.profiles))


def make(
    config: Any,
    *,
    dataset: Path | None = None,
    cluster: str | Sequence[str] | None = None,
    hbm: str | None = None,
    host_mem: str | None = None,
    profiles: Path | None = None,
) -> Asked:
    """config: of a run.  dataset: a dataset.json or its folder, where it is not at data.path.  cluster: such as
    "h100-80gb:16x8"; of several the first that can have what the config asks for; this machine with train.nproc ranks
    when None.  hbm, host_mem: instead of the config's."""
    from trainer import planning
    from trainer.tables import with_overrides

    given = {"profiles": profiles, "hbm": hbm, "host_mem": host_mem}
    changes = {key: value for key, value in given.items() if value is not None}
    for key, value in changes.items():
        if key != "profiles":
            quantity(value, "bytes", where=f"--{key.replace('_', '-')}")
    config = config.model_copy(update={"plan": config.plan.model_copy(update=changes)})
    data = opened(config, dataset)
    known = planning.profiles_of(config)
    if cluster is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        ranks = config.train.nproc
        found = [planning.cluster_of(config, world_size=ranks, local_world_size=ranks, device=device)]
    else:
        found = [topology.parse(each, known) for each in ([cluster] if isinstance(cluster, str) else cluster)]

    def asked_on(cluster: Topology, config: Any, model: Any) -> Asked:
        if cluster.world_size > MOST_RANKS:
            raise UserError(
                f"cluster {cluster.title}: {cluster.world_size:,} ranks; at most {MOST_RANKS:,} are planned"
            )

        def with_tables(overrides: Sequence[Any]) -> Asked:
            changed = with_overrides(config, overrides)
            return asked_on(cluster, changed, planning.on_meta(changed, data))

        def with_fbgemm() -> Asked:
            kernels = config.kernels.model_copy(update={"embedding_bag": "fbgemm"})
            return asked_on(cluster, config.model_copy(update={"kernels": kernels}), model)

        int8 = any(table.row_type == "int8" for table in model.tables.tables)
        return Asked(
            name=config.name,
            work=planning.work_of_config(config, data, model, device=cluster.device),
            cluster=cluster,
            embeddings=model.embeddings,
            rules=rules_of(model.embeddings, cluster, planning.constraints_of(config, device=cluster.device)),
            limits=planning.limits_of(config, cluster),
            profiles=known,
            again=lambda other: asked_on(other, config, model),
            with_tables=with_tables,
            with_fbgemm=None if int8 or planning.has_fbgemm(config, cluster.device) else with_fbgemm,
        )

    model, refused = planning.on_meta(config, data), []
    for each in found:
        try:
            return asked_on(each, config, model)
        except UserError as error:
            refused.append(error)
    raise refused[0]


def opened(config: Any, path: Path | None) -> Any:
    """The figures of the features: of a dataset.json, a folder, or the config's own data."""
    from trainer.data import dataset as datasets
    from trainer.data.parquet import open_dataset

    if path is None:
        if config.data.features is None and not (config.data.path / "dataset.json").exists():
            made = f"`tablemesh prepare {config.data.prepare or 'SOURCE'} {config.data.path}`"
            raise UserError(
                f"data.path = {str(config.data.path)!r}: no dataset.json there; the planner needs the features' "
                f"figures: prepare the data ({made} or, where the config says how, a run), or give a dataset.json made "
                "elsewhere with --dataset FILE"
            )
        return open_dataset(config.data.path, config.data.features)
    if path.is_dir():
        return open_dataset(path, config.data.features)
    return datasets.read(path)


def answer(asked: Asked) -> dict[str, Any]:
    """The plan explained, with plan.json under "plan"; or feasible: false, what is short, and the ways out."""
    try:
        solution = planner.solve(asked.work, asked.cluster, rules=asked.rules, limits=asked.limits)
    except Infeasible as short:
        ways = _way_by_kernel(asked)
        ways += ways_out(asked.work, asked.cluster, rules=asked.rules, limits=asked.limits)
        ways += ways_by_kind(asked)
        return {
            "feasible": False,
            "cluster": asked.cluster.title,
            "message": short.words,
            "short_by_bytes": short.short_by,
            "who": short.who,
            "table": short.table,
            "ways_out": [{"how": w.how, "step_ms": 1e3 * w.step, "change": dict(w.change)} for w in ways],
        }
    step = simulate(solution.load)
    return explain(solution) | {
        "name": asked.name,
        "simulated": figures(step, solution.prices.work.batch_size),
        "plan": describe_solution(solution, asked.embeddings),
    }


def _way_by_kernel(asked: Asked) -> list[WayOut]:
    """On GPUs FBGEMM's kernels instead of ours, which have no table in host memory, where that helps."""
    if asked.with_fbgemm is None or asked.cluster.device == "cpu":
        return []
    changed = asked.with_fbgemm()
    try:
        found = planner.solve(changed.work, changed.cluster, rules=changed.rules, limits=changed.limits)
    except UserError:
        return []
    can = frozenset[str]().union(*(changed.rules.get(t.name, Rule()).can_tiers for t in changed.work.tables))
    how = f'other kernels: kernels.embedding_bag = "fbgemm" can have tables in {memory_words(can - {"device"})}'
    return [WayOut(how=how, step=found.load.step_seconds, change={"embedding_bag": "fbgemm"})]


def figures(step: Step, batch_size: int) -> dict[str, Any]:
    """A simulated step for programs: what no plan changes, such as the host's launches, included."""
    return {
        "step_ms": 1e3 * step.seconds,
        "samples_per_second": batch_size / step.seconds,
        "bound_by": step.bound_by,
        "paths_ms": {name: 1e3 * seconds for name, seconds in step.paths.items()},
    }


def compare(asked: Asked, a: str, b: str) -> dict[str, Any]:
    """Two plans priced with the same costs.

    a, b: "auto" (the planner's), a sharding type (all tables by it), a plan.json, or a cluster (planned there).
    """
    first, second = plan_of(asked, a), plan_of(asked, b)
    moved = []
    for t, table in enumerate(asked.work.tables):
        labels = [s.prices.kinds[s.choices[t].kind].kind.label for s in (first, second)]
        if labels[0] != labels[1]:
            moved.append({"name": table.name, "a": labels[0], "b": labels[1]})
    return {"a": _figures(a, first), "b": _figures(b, second), "differ": moved}


def _figures(name: str, solution: Solution) -> dict[str, Any]:
    found = solution.load
    slowest = int(found.rank_seconds.argmax())
    return {
        "name": name,
        "cluster": solution.prices.topology.title,
        "step_ms": 1e3 * found.step_seconds,
        "samples_per_second": solution.prices.work.batch_size / found.step_seconds,
        "most_bytes": int(found.rank_bytes.max()),
        "left": _left(name, solution),
        "fits": bool((found.rank_bytes <= solution.options.device_limit + solution.prices.base_bytes + 1).all()),
        "parts_ms": {part: 1e3 * seconds for part, seconds in parts_of(found, slowest).items()},
    }


def _left(name: str, solution: Solution) -> list[str]:
    """The tables that are not by the sharding type that was asked for all of them: they cannot be."""
    if name not in SHARDING_TYPES:
        return []
    kinds = [solution.prices.kinds[c.kind].kind.sharding for c in solution.choices]
    return [t.name for t, kind in zip(solution.prices.tables, kinds, strict=True) if kind != name]


def plan_of(asked: Asked, name: str) -> Solution:
    """The plan that `compare` means by a name.  A sharding type holds for every table that can have it there."""
    if name == "auto":
        return planner.solve(asked.work, asked.cluster, rules=asked.rules, limits=asked.limits)
    if name in SHARDING_TYPES:
        said = f"--compare {name}"
        wanted = {
            table.name: Rule(shardings=frozenset([name]), tiers=own.can_tiers, said=said)
            for table in asked.work.tables
            if name in (own := asked.rules.get(table.name, Rule())).can_shardings
        }
        rules = {**asked.rules, **planner.possible(asked.work, asked.cluster, wanted)}
        if not any(rule.said == said for rule in rules.values()):
            raise UserError(
                f"{said}: none of the {len(asked.work.tables)} tables can be {name} on {asked.cluster.title}"
            )
        try:
            return planner.solve(asked.work, asked.cluster, rules=rules, limits=asked.limits)
        except Infeasible as short:
            raise UserError(f"{said}: no such plan fits: {short.words}") from short
    if name.partition(":")[0] in topology.profiles() | dict(asked.profiles):
        other = asked.on(name)
        return planner.solve(other.work, other.cluster, rules=other.rules, limits=other.limits)
    if not Path(name).is_file():
        known = ["auto", *SHARDING_TYPES, *topology.profiles(), *asked.profiles]
        raise UserError(f"--compare {name}: neither a file nor a plan or cluster; {registry.nearest(name, known)}")
    kinds: list[Kind] = []
    ranks: list[tuple[int, ...]] = []
    for table, placed in read(Path(name), asked.embeddings, asked.cluster.world_size).items():
        kind, where = kind_of(placed)
        kind = replace(kind, tier="device", cache_share=0.0) if asked.cluster.device == "cpu" else kind
        check_can_be(name, table, asked.rules.get(table, Rule()), sharding=kind.sharding, tier=kind.tier)
        kinds.append(kind)
        ranks.append(where)
    return priced(price(asked.work, asked.cluster, extra=kinds), kinds, ranks, asked.limits)


def priced(prices: Prices, kinds: list[Kind], ranks: list[tuple[int, ...]], limits: Limits) -> Solution:
    """A plan somebody else made: kind and ranks of every table."""
    number = {kind.kind: k for k, kind in enumerate(prices.kinds)}
    choices = tuple(Choice(number[kind], where) for kind, where in zip(kinds, ranks, strict=True))
    device, host = limits.of(prices.topology)
    allowed = np.ones((len(prices.kinds), len(prices.tables)), bool)
    options = Options.of(prices, allowed, device_limit=device, host_limit=host)
    return Solution(prices, options, choices, load(prices, choices), 0.0, False)


def kind_of(placed: Placed) -> tuple[Kind, tuple[int, ...]]:
    """(kind, ranks of its parts, column parts first) of a table of plan.json."""
    parts = sorted(placed.parts, key=lambda p: (p[3], p[1], p[0]))
    ranks = tuple(p[0] for p in parts)
    if placed.sharding == "data_parallel":
        return Kind(sharding=placed.sharding), ranks
    columns, rows = len({p[3:] for p in parts}), len({p[1:3] for p in parts})
    kind = Kind(
        sharding=placed.sharding, tier=placed.tier, column_parts=columns, row_parts=rows, cache_share=placed.cache_share
    )
    return kind, ranks
