"""From a config to what the planner takes: the cluster, the work, the limits and the constraints.

cluster_of(config, ...) -> Topology
on_meta(config, dataset) -> OnMeta
work_of_config(config, dataset, model, device=...) -> Work
limits_of(config, cluster), constraints_of(config, device=...)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernels import registry
from kernels.errors import UserError
from kernels.row_counts import COUNT_BYTES
from sharding import topology
from sharding.embeddings import Embeddings, build_embeddings
from sharding.fbgemm import lacks_decay
from sharding.plan import Figures, work_of
from sharding.planner import Limits, Rule, gib
from sharding.skew import Skew
from sharding.topology import Topology, quantity
from sharding.work import Work
from trainer import precision
from trainer.config import Config
from trainer.data.dataset import Categorical, Dataset
from trainer.data.footprint import readers
from trainer.dense_work import dense_work
from trainer.models.base import ModelInputs
from trainer.optim.base import plugin
from trainer.tables import ResolvedTables, resolve


def profiles_of(config: Config) -> dict[str, Topology]:
    """Profiles beside the built-in ones: those of plan.profiles."""
    return {} if config.plan.profiles is None else topology.load_profiles(config.plan.profiles)


def cluster_of(config: Config, *, world_size: int, local_world_size: int, device: str) -> Topology:
    """This machine."""
    return topology.detect(
        world_size=world_size, local_world_size=local_world_size, device=device, known=profiles_of(config)
    )


def limits_of(config: Config, cluster: Topology) -> Limits:
    """Bytes that plans may use, as the config says.  On a CPU the ranks share what there is of the host's memory."""
    plan = config.plan
    device = None if plan.hbm is None else quantity(plan.hbm, "bytes", where="plan.hbm")
    host = None if plan.host_mem is None else quantity(plan.host_mem, "bytes", where="plan.host_mem")
    if cluster.device == "cpu":
        if device is not None:
            raise UserError(
                f"plan.hbm = {plan.hbm!r}: the ranks of {cluster.title} have no device memory; plan.host_mem limits "
                "the host's"
            )
        return Limits(device=None if host is None else host / cluster.ranks_per_host)
    if device is not None and device > cluster.device_memory:
        raise UserError(
            f"plan.hbm = {plan.hbm!r}: a rank of {cluster.title} has {gib(cluster.device_memory)} of device memory; "
            "use at most that, or give a profile with more"
        )
    return Limits(device=device, host=host)


def constraints_of(config: Config, *, device: str) -> list[tuple[tuple[str, ...], Rule]]:
    """The planner's form of [[plan.constraints]], and what the kernels asked for cannot have on this type of device."""
    found = _of_kernel(config, device)
    for i, constraint in enumerate(config.plan.constraints):
        said = f"plan.constraints[{i}]"
        if constraint.sharding is None and constraint.tier is None:
            raise UserError(f"{said}: says neither sharding nor tier, so it constrains nothing; give one, or remove it")
        patterns = (constraint.match,) if isinstance(constraint.match, str) else constraint.match
        if not patterns:
            raise UserError(f"{said}: match = [] names no table; give names or patterns of tables, or remove it")
        rule = Rule(
            shardings=None if constraint.sharding is None else frozenset(constraint.sharding),
            tiers=None if constraint.tier is None else frozenset(constraint.tier),
            said=said,
        )
        found.append((patterns, rule))
    return found


def _of_kernel(config: Config, device: str) -> list[tuple[tuple[str, ...], Rule]]:
    """FBGEMM's kernels can have tables in host memory, ours only in the GPU's own.  On a CPU there is one memory."""
    if device == "cpu":
        return []
    if not has_fbgemm(config, device):
        tiers = frozenset({"device"})
        said = f"kernels.embedding_bag = {config.kernels.embedding_bag!r} (tables in the GPU's own memory)"
    elif lacks_decay(plugin(config.optim.sparse).table(config.optim.sparse), device=torch.device(device)):
        tiers = frozenset({"device", "host"})
        said = f"l2 with optim.sparse.kind = {config.optim.sparse.kind!r} (an update that does not see cached rows)"
    else:
        return []
    return [(("*",), Rule(tiers=tiers, can_tiers=tiers, said=said))]


def has_fbgemm(config: Config, device: str) -> bool:
    """Whether tables have FBGEMM's kernels, which a GPU gets unless the config says otherwise."""
    asked = config.kernels.embedding_bag
    return asked == "fbgemm" or (device != "cpu" and asked == "auto")


def work_of_config(config: Config, dataset: Dataset, model: "OnMeta", *, device: str) -> Work:
    """What a step of this config does on devices of this type, "cpu" or "cuda"."""
    sparse, dense = config.optim.sparse, config.optim.dense
    bf16 = precision.choose(config.train.precision, torch.device(device)).is_bf16
    fbgemm = has_fbgemm(config, device)  # gives float32 vectors
    counted = COUNT_BYTES if config.checkpoint.count_updates else 0
    dense_state = plugin(dense).state_bytes_per_row(dense, 1024) / 1024
    return work_of(
        model.embeddings,
        batch_size=config.train.batch_size,
        figures=figures_of(dataset, model.tables.rows),
        dense=dense_work(model.net, model.inputs, state_bytes_per_parameter=dense_state),
        state_bytes_per_row=lambda dim: plugin(sparse).state_bytes_per_row(sparse, dim) + counted,
        overlapped=config.train.pipeline == "overlapped",
        bf16=bf16,
        vector_element=2 if bf16 and not fbgemm else 4,
        readers=readers(config, dataset, model.tables.rows),
    )


def figures_of(dataset: Dataset, rows: Mapping[str, int]) -> dict[str, Figures]:
    """What dataset.json says of each feature's ids."""
    return {c.name: _figures(c, rows[c.name]) for c in dataset.categorical}


def _figures(feature: Categorical, rows: int) -> Figures:
    stats: Any = feature.stats
    if stats is None:
        return Figures()
    skew = Skew.of(rows=rows, top_share=stats.top_share, distinct=stats.distinct, ordered=feature.ids == "vocab")
    return Figures(ids_per_bag=stats.ids_per_bag, skew=skew)


@dataclass(frozen=True)
class OnMeta:
    """The parts of a model that nothing is allocated for yet."""

    tables: ResolvedTables
    inputs: ModelInputs
    net: nn.Module
    embeddings: Embeddings


def on_meta(config: Config, dataset: Dataset) -> OnMeta:
    """Tables, dense layers and look-up of this config on the meta device.  UserError where they do not fit together."""
    tables = resolve(config, dataset)
    inputs = ModelInputs(
        dense=len(dataset.dense),
        dims=tables.dims,
        tasks=len(dataset.labels),
        features=tables.features,
        interaction=config.kernels.interaction,
    )
    with torch.device("meta"):
        net = registry.load("trainer.models", config.model.kind).build(config.model, inputs)
    return OnMeta(tables, inputs, net, build_embeddings(tables=tables.tables, features=tables.features))
