"""A copy of tables made while steps change them is what they were when it began."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sharding import snapshot as snapshots
from sharding.snapshot import Snapshot

ROWS = (700, 1, 33)


class Kernel(nn.Module):
    """Three tables with a state each, four features; a call adds one to every row that it looks up."""

    def __init__(self, dtype):
        super().__init__()
        self.tables = [torch.randn(rows, 4).to(dtype) for rows in ROWS]
        self.states = [[torch.randn(rows)] for rows in ROWS]
        self.emb_module = SimpleNamespace(
            feature_table_map=[0, 0, 1, 2],
            split_embedding_weights=lambda: self.tables,
            split_optimizer_states=lambda: self.states,
        )

    def forward(self, features):
        for table, key in zip(self.emb_module.feature_table_map, features.keys(), strict=True):
            rows = features[key].values().unique()
            self.tables[table][rows] += 1
            self.states[table][0][rows] += 1


def step(kernel, generator):
    ids = [torch.randint(0, ROWS[t], (20,), generator=generator) for t in kernel.emb_module.feature_table_map]
    kernel(KeyedJaggedTensor(keys=list("abcd"), values=torch.cat(ids), lengths=torch.ones(80, dtype=torch.int64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_between_any_two_blocks_do_not_show(monkeypatch, dtype):
    monkeypatch.setattr(snapshots, "BLOCK_BYTES", 640)
    kernel, generator = Kernel(dtype), torch.Generator().manual_seed(1)
    snapshot = Snapshot([kernel])
    step(kernel, generator)
    for _ in range(3):
        held = [*kernel.tables, *(state for (state,) in kernel.states)]
        expected = [t.clone() for t in held]
        into = {t.data_ptr(): torch.full_like(t, torch.nan) for t in held}
        snapshot.begin()
        step(kernel, generator)
        copyto = np.copyto

        def and_step(to, source, copyto=copyto):
            step(kernel, generator)  # in the middle of a block: its rows change half copied
            copyto(to[: len(to) // 2], source[: len(to) // 2])
            step(kernel, generator)
            copyto(to[len(to) // 2 :], source[len(to) // 2 :])

        monkeypatch.setattr(np, "copyto", and_step)
        snapshot.copy(into)
        monkeypatch.setattr(np, "copyto", copyto)
        step(kernel, generator)
        assert snapshot.seconds > 0
        assert all(torch.equal(into[t.data_ptr()], was) for t, was in zip(held, expected, strict=True))
        assert not any(torch.equal(t, was) for t, was in zip(held, expected, strict=True))


def test_nothing_is_kept_after_a_copy_that_fails():
    kernel, generator = Kernel(torch.float32), torch.Generator().manual_seed(1)
    snapshot = Snapshot([kernel])
    snapshot.begin()
    step(kernel, generator)
    with pytest.raises(ValueError, match="broadcast"):
        snapshot.copy({kernel.tables[0].data_ptr(): torch.empty(3)})
    step(kernel, generator)
    assert not snapshot._kept and not any(t.kept_E.any() for t in next(iter(snapshot._tables.values())))
