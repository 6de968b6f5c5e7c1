"""How the look-ups of a batch fall on the parts of tables that are split by rows.

    row_balance(embeddings, ids, plan) -> [{"table", "kind", "lookups": [of each part], "ranks": [...], "fullest"}]

A rank with a popular part waits for its memory while the others wait for it.  Hashed rows (unified, hashed) spread
popular ids; rows in the order of a vocabulary put them all in the first part.

    rows 0-4 on rank 0, 5-9 on rank 1, look-ups of rows 1, 1, 2, 7: lookups [3, 1], fullest 3 / 2 = 1.5
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from kernels.id_map import owner_of
from sharding.embeddings import Embeddings


@torch.no_grad()
def row_balance(embeddings: Embeddings, ids: KeyedJaggedTensor, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every table in `plan` (sharding.plan.describe) with parts of several rows.

    All ranks together; ids: of this rank's part of the batch.  lookups: over all ranks; fullest: the most of a part,
    divided by the mean.  Where rows are given to ids, an id's hash says which part it is looked up in.
    """
    rows_of: dict[str, Tensor] = {}
    if embeddings.ebc is not None:
        mapped = ids if embeddings.id_map is None else embeddings.id_map(ids)
        rows_of |= {feature: mapped[feature].values() for feature in mapped.keys()}  # noqa: SIM118  (no dict)
    if embeddings.spread is not None:
        spread = embeddings.spread(ids)
        rows_of |= {feature: spread[feature].values() for feature in spread.keys()}  # noqa: SIM118
    found = []
    for table in plan["tables"]:
        firsts = sorted({shard["rows"][0] for shard in table["shards"]})
        if len(firsts) < 2:
            continue
        by_id = embeddings.by_id.get(table["name"])
        if by_id is None:
            rows_N = torch.cat([rows_of[feature] for feature in table["features"]]).long().cpu()
            part_N = torch.bucketize(rows_N, torch.tensor(firsts), right=True) - 1
        else:
            ids_N = torch.cat([ids[feature].values() for feature in table["features"]]).long().cpu()
            part_N = owner_of(ids_N, ranks=len(firsts), seed=by_id.policy.seed)
        ranks = [[s["rank"] for s in table["shards"] if s["rows"][0] == first] for first in firsts]
        count_P = torch.bincount(part_N, minlength=len(firsts)).to(ids.values().device)
        dist.all_reduce(count_P)
        counts = count_P.tolist()
        fullest = max(counts) * len(counts) / max(1, sum(counts))
        about = {"table": table["name"], "kind": table["kind"]}
        found.append({**about, "lookups": counts, "ranks": ranks, "fullest": fullest})
    return found
