import errno
import json

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from kernels.errors import UserError
from tests.ranks import run_ranks
from trainer import checkpoint


def position(step):
    return checkpoint.Position(
        step=step, epoch=0, samples=step * 8, world_size=dist.get_world_size(), config_sha256="c", data_fingerprint="d"
    )


def state(fill):
    return {"model": {"w": torch.full((3, 2), float(fill))}, "step": torch.tensor(fill)}


def save_and_load(folder):
    found = []
    for step in (1, 2, 10):
        path, size, seconds = checkpoint.save(folder, state(step), position(step), keep=2)
        assert path.name == f"step_{step}" and seconds > 0
        assert (size > 0) == (dist.get_rank() == 0)
        found.append([p.name for p in checkpoint.found(folder)])
        dist.barrier()
    read = state(0)
    checkpoint.load(folder / "step_10", read)
    assert torch.equal(read["model"]["w"], torch.full((3, 2), 10.0))
    assert checkpoint.position(folder / "step_10") == position(10)
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_save_load_and_keep(tmp_path, world_size):
    for found in run_ranks(save_and_load, world_size, tmp_path / "checkpoints"):
        assert found == [["step_1"], ["step_1", "step_2"], ["step_2", "step_10"]]
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def save_twice(folder):
    checkpoint.save(folder, state(1), position(5), keep=2)
    (folder / "step_4.partial").mkdir(exist_ok=True)
    checkpoint.save(folder, state(2), position(5), keep=2)
    read = state(0)
    checkpoint.load(folder / "step_5", read)
    return read["step"].item()


def test_a_step_can_be_saved_again_and_what_a_dead_run_left_goes(tmp_path):
    assert run_ranks(save_twice, 1, tmp_path) == [2]
    assert [p.name for p in tmp_path.iterdir()] == ["step_5"]


def save_on_a_full_disk(folder):
    checkpoint.save(folder, state(1), position(1), keep=2)
    write = dcp.FileSystemWriter.write_data

    def full(self, *args):
        if dist.get_rank() == dist.get_world_size() - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args)

    dcp.FileSystemWriter.write_data = full
    try:
        checkpoint.save(folder, state(2), position(2), keep=2)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_harms_no_earlier_checkpoint(tmp_path, world_size):
    for message in run_ranks(save_on_a_full_disk, world_size, tmp_path):
        for word in ("step_2", f"rank {world_size - 1}", "No space left on device", "1 finished checkpoints"):
            assert word in message
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_only_whole_checkpoints_are_found(tmp_path):
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint.newest(tmp_path)
    folder = tmp_path / "checkpoints"
    for name in ("step_3", "step_20", "step_100.partial", "step_50"):
        (folder / name).mkdir(parents=True)
    for name in ("step_3", "step_20", "step_100.partial"):
        (folder / name / "checkpoint.json").write_text(json.dumps({}))
    assert [p.name for p in checkpoint.found(folder)] == ["step_3", "step_20"]
    assert checkpoint.newest(tmp_path).name == "step_20"
    with pytest.raises(UserError, match=r"checkpoint\.json: cannot be read"):
        checkpoint.position(folder / "step_3")


def load_other(folder):
    checkpoint.save(folder, state(1), position(1), keep=1)
    try:
        checkpoint.load(folder / "step_1", {"model": {"other": torch.zeros(2)}})
    except UserError as error:
        return str(error)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    (message,) = run_ranks(load_other, 1, tmp_path)
    assert "step_1" in message and "model.other" in message
