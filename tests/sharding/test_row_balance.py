"""Look-ups by part of row-wise tables, counted id by id in plain Python."""

import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from kernels.hashing import bucket_of, mix64_of
from sharding.embeddings import build_embeddings
from sharding.row_balance import row_balance
from sharding.tables.base import Table
from sharding.tables.unified import Unified, _seed
from tests.ranks import run_ranks

SHARED = Table(
    name="all",
    features=("a", "b"),
    rows=50,
    dim=8,
    kind="unified",
    options={"rows": 21, "lookups": 2},
    sharding="row_wise",
)
PLAIN = Table(name="c", features=("c",), rows=10, dim=8, sharding="row_wise")
WHOLE = Table(name="d", features=("d",), rows=10, dim=8, sharding="table_wise")
GIVEN = Table(name="g", features=("g", "h"), rows=300, dim=8, kind="collisionless", sharding="row_wise")
IDS = {
    "a": [[1, 2, 3], [0, 49]],
    "b": [[7], []],
    "c": [[0, 1, 1, 2], [9]],
    "d": [[1], [2]],
    "g": [[2**62, -5], [7]],
    "h": [[], [-5, 8]],
}  # by feature and rank


def plan_of(embeddings):
    """Row-wise tables in halves on ranks 0 and 1, as sharding.plan.describe says it."""
    tables = []
    for t in embeddings.physical:
        half = -(-t.rows // 2)
        cuts = [[0, half], [half, t.rows]] if t.sharding == "row_wise" else [[0, t.rows]]
        shards = [{"rank": rank, "rows": rows} for rank, rows in enumerate(cuts)]
        kind = embeddings.logical[t.name].kind
        tables.append({"name": t.name, "kind": kind, "features": t.features, "shards": shards})
    return {"tables": tables}


def balance():
    rank = dist.get_rank()
    embeddings = build_embeddings(tables=(SHARED, PLAIN, WHOLE, GIVEN), features=tuple(IDS))
    values = [torch.tensor(of_rank[rank], dtype=torch.int64) for of_rank in IDS.values()]
    ids = KeyedJaggedTensor(keys=list(IDS), values=torch.cat(values), lengths=torch.tensor([len(v) for v in values]))
    return row_balance(embeddings, ids, plan_of(embeddings))


def test_look_ups_are_counted_where_they_fall():
    found, again = run_ranks(balance, 2)
    assert found == again
    by_name = {entry["table"]: entry for entry in found}
    assert by_name.keys() == {"all#unified", "c", "g"}
    assert by_name["c"] == {"table": "c", "kind": "standard", "lookups": [4, 1], "ranks": [[0], [1]], "fullest": 1.6}
    options = SHARED.read(Unified)
    expected = [0, 0]
    for feature in SHARED.features:
        for id in (id for of_rank in IDS[feature] for id in of_rank):
            for j in range(2):
                row = bucket_of(id, seed=_seed(SHARED, options, feature, j), rows=21)
                expected[row >= 11] += 1
    assert by_name["all#unified"]["lookups"] == expected
    owners = [((mix64_of(id) >> 56) + 1) * 2 - 1 >> 8 for feature in "gh" for of_rank in IDS[feature] for id in of_rank]
    assert by_name["g"]["lookups"] == [owners.count(0), owners.count(1)]
