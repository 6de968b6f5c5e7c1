"""The ranks' store: at a port of its own, read by the others when rank 0 has opened it; a late rank 0 is said."""

import threading
from datetime import timedelta

import pytest
from torch.distributed import DistNetworkError

from trainer import store as stores

LIMIT = timedelta(seconds=30)


def test_ranks_meet_in_it(tmp_path, monkeypatch):
    assert stores.path_from_env() is None
    for name, value in stores.prepare(tmp_path / "store").items():
        monkeypatch.setenv(name, value)
    path, found = stores.path_from_env(), {}

    def one(rank):
        store = stores.open_store(path, rank=rank, limit=LIMIT)
        store.set(f"rank {rank}", str(rank))
        store.wait([f"rank {r}" for r in range(3)], LIMIT)
        found[rank] = store

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (2, 1, 0)]  # the others before rank 0
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {found[rank].port for rank in range(3)} == {int(path.read_text())}


def test_the_last_ranks_store_is_not_taken_for_the_new_one(tmp_path):
    path = tmp_path / "store"
    path.write_text("1")
    stores.prepare(path)
    with pytest.raises(DistNetworkError, match="rank 0 did not open the ranks' store within 0 s"):
        stores.open_store(path, rank=1, limit=timedelta(seconds=0.1))
