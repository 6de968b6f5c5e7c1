"""The look-up by itself, not sharded: order, pooling, padding, kinds, errors."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from kernels.errors import UserError
from sharding.embeddings import IdMap, build_embeddings, stored_dim
from sharding.tables.base import Source, Table

TABLES = (
    Table(name="ta", rows=5, dim=4, features=("a",)),
    Table(name="tbc", rows=7, dim=6, features=("c", "b"), pooling="mean"),
    Table(name="td", rows=3, dim=1, features=("d",)),
)


def bags(**features: list[list[int]]) -> KeyedJaggedTensor:
    values = [i for rows in features.values() for bag in rows for i in bag]
    lengths = [len(bag) for rows in features.values() for bag in rows]
    return KeyedJaggedTensor(
        keys=list(features), values=torch.tensor(values, dtype=torch.int64), lengths=torch.tensor(lengths)
    )


def filled(tables: tuple[Table, ...], features: tuple[str, ...]):
    """Embeddings on the CPU whose value in (row, column) is row + column / 10."""
    module = build_embeddings(tables=tables, features=features, device="cpu")
    with torch.no_grad():
        for bag in module.ebc.embedding_bags.values():
            rows, columns = bag.weight.shape
            bag.weight.copy_(torch.arange(rows)[:, None] + torch.arange(columns) / 10)
    return module


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (("a", "b", "c", "d"), [[3.0, 3.1, 3.2, 3.3], [2.5, 2.6, 2.7, 2.8, 2.9, 3.0], [0.0] * 6, [1.0]]),
        (("d", "c", "a"), [[1.0], [0.0] * 6, [3.0, 3.1, 3.2, 3.3]]),
    ],
)
def test_vectors_come_in_feature_order_whatever_the_tables_and_the_keys_are(features, expected):
    module = filled(TABLES, features)
    ids = bags(d=[[1], [0, 0]], c=[[], [6]], b=[[1, 4], []], a=[[1, 2, 0], []])
    emb_BX = module(ids)
    assert emb_BX.shape == (2, sum(module.dims))
    # a: rows 1 + 2 + 0 summed, columns .0 .. .3 three times
    wanted = torch.tensor([v for part in expected for v in part])
    at = torch.cat(
        [
            torch.tensor([0.0, 0.2, 0.4, 0.6]) if f == "a" else torch.zeros(d)
            for f, d in zip(features, module.dims, strict=True)
        ]
    )
    torch.testing.assert_close(emb_BX[0], wanted + at)


def test_an_empty_bag_gives_zeros_and_repeated_ids_count_twice():
    module = filled(TABLES, ("a", "d"))
    emb_BX = module(bags(a=[[], [4, 4]], d=[[2, 2, 2], []], b=[[], []], c=[[], []]))
    torch.testing.assert_close(emb_BX, torch.tensor([[0.0, 0, 0, 0, 6], [8.0, 8.2, 8.4, 8.6, 0]]))


def test_a_dim_is_stored_as_the_next_multiple_of_four():
    assert [stored_dim(d) for d in (1, 2, 4, 5, 8, 13)] == [4, 4, 4, 8, 8, 16]


def test_the_id_map_keeps_the_bags_and_maps_the_ids():
    sources = {
        "f#q": Source(feature="f", ids=lambda ids: ids // 4),
        "f#r": Source(feature="f", ids=lambda ids: ids % 4),
        "g": Source(feature="g"),
    }
    mapped = IdMap(sources)(bags(g=[[1], [2], []], f=[[7], [], [3, 9]])).to_dict()
    as_lists = {k: [v.tolist() for v in mapped[k].to_dense()] for k in mapped}
    assert as_lists == {"f#q": [[1], [], [0, 2]], "f#r": [[3], [], [3, 1]], "g": [[1], [2], []]}


def test_a_kind_of_the_users_own_is_lowered_to_physical_tables():
    table = Table(name="t", rows=20, dim=8, features=("f", "g"), kind="tests.sharding.quotient", pooling="mean")
    module = filled((table,), ("g", "f"))
    assert [(t.name, t.rows, t.dim) for t in module.physical] == [("t#q", 3, 4), ("t#r", 8, 4)]
    assert all(module.logical[t.name] is table for t in module.physical)
    emb_BX = module(bags(f=[[19, 3]], g=[[]]))  # 19 = 2 * 8 + 3, 3 = 0 * 8 + 3
    columns = torch.arange(4) / 10
    torch.testing.assert_close(emb_BX[0], torch.cat([torch.zeros(8), 1 + columns, 3 + columns]))


@pytest.mark.parametrize(
    ("tables", "features", "words"),
    [
        ((Table(name="t", rows=2, dim=4, features=("a",)),), ("a", "bb"), ["'bb'", "no table"]),
        (
            (Table(name="t", rows=2, dim=4, features=("a",)), Table(name="u", rows=2, dim=4, features=("a",))),
            ("a",),
            ["'a'", "'t'", "'u'"],
        ),
        (
            (Table(name="t", rows=2, dim=4, features=("a",)), Table(name="t", rows=2, dim=4, features=("b",))),
            ("a", "b"),
            ["'t'", "unique"],
        ),
        ((Table(name="a.b", rows=2, dim=4, features=("a",)),), ("a",), ["'a.b'"]),
        ((Table(name="t", rows=2, dim=4, features=("a",), options={"buckets": 3}),), ("a",), ["'t'", "buckets"]),
        ((Table(name="t", rows=2, dim=4, features=("a",), kind="standart"),), ("a",), ["standart", "standard"]),
    ],
)
def test_what_cannot_be_built_is_named(tables, features, words):
    with pytest.raises(UserError) as error:
        build_embeddings(tables=tables, features=features)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_features_that_would_be_one_physical_feature_are_refused():
    parts = Table(name="t", rows=40, dim=8, features=("f",), kind="hashed", options={"rows": 5, "seeds": 2})
    with pytest.raises(UserError, match=r"'f' of table 't' and 'f#1' of table 'u'.*'f#1'.*rename one"):
        build_embeddings(tables=(parts, Table(name="u", rows=9, dim=8, features=("f#1",))), features=("f", "f#1"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"per_id": True}, "per id: rows given to ids are pooled as they are"),
        ({"combine": nn.Identity()}, "with a combine"),
        ({"by_id": None, "per_id": True}, "says per_id.*has no combine"),
    ],
)
def test_a_kind_that_cannot_pool_as_asked_is_named(monkeypatch, changes, words):
    from sharding.tables import collisionless

    given = Table(name="t", rows=300, dim=8, features=("f",), kind="collisionless", pooling="mean")
    odd = replace(collisionless.lower(given), **changes)
    monkeypatch.setattr(collisionless, "lower", lambda table: odd)
    with pytest.raises(UserError, match=rf"table 't': kind 'collisionless'.*{words}"):
        build_embeddings(tables=(given,), features=("f",))
