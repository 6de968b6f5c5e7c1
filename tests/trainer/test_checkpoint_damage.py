"""What is damaged is detected, named, and never loaded; what cannot be written harms nothing."""

import errno
import os
import resource
import shutil
import subprocess

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.errors import UserError
from tests.ranks import run_ranks
from tests.trainer import checkpoints
from trainer.__main__ import _classify
from trainer.checkpoint import files as files_module
from trainer.checkpoint import manifest as manifests
from trainer.checkpoint import restore
from trainer.checkpoint.files import Files, verify
from trainer.checkpoint.manifest import Damaged
from trainer.checkpoint.place import MANIFEST, Place
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.storage import whole
from trainer.config import Checkpoint
from trainer.runlog import RunLog
from trainer.world import World

TABLES = {"user": (701, 8), "item": (64, 4)}


def write_two(folder, step):
    """A checkpoint of two tables and a dense layer; small pieces, so that there are many hashes."""
    files_module.PIECE_BYTES = 512
    parts = [p for name, shape in TABLES.items() for p in checkpoints.row_parts(name, checkpoints.table(*shape))]
    parts += [whole("dense/net.weight", torch.arange(7.0)), whole("dense/net.scale", torch.tensor(3.0))]
    checkpoints.write(Place(folder), step, parts)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    run_ranks(write_two, 2, folder, 1)
    return folder


def damages(folder, step=1):
    place, name = Place(folder), f"step_{step}"
    return verify(place, name, manifests.read(place, name))


def test_a_whole_checkpoint_is_whole_and_reads_back(written):
    assert damages(written) == []
    files = Files(Place(written), "step_1", manifests.read(Place(written), "step_1"))
    for name, shape in TABLES.items():
        assert torch.equal(files.read(f"tables/{name}/weight"), checkpoints.table(*shape))
        assert torch.equal(files.read(f"tables/{name}/weight", rows=(5, 60)), checkpoints.table(*shape)[5:60])
    assert torch.equal(files.read("dense/net.weight"), torch.arange(7.0))
    assert files.read("dense/net.scale").item() == 3.0


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.integers(0, 10**6))
def test_every_flipped_bit_is_detected(written, share, bit, which):
    folder = written / "step_1"
    names = sorted(p.name for p in folder.iterdir())
    path = folder / names[which % len(names)]
    data = path.read_bytes()
    at = int(share * len(data))
    try:
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
        if path.name == MANIFEST:
            with pytest.raises(Damaged, match=r"manifest\.json: it was cut short or changed"):
                manifests.read(Place(written), "step_1")
        else:
            (damage,) = damages(written)
            assert damage.file == path.name
            assert damage.table in (*TABLES, None)
            if damage.table:
                assert f"table '{damage.table}'" in str(damage) and "rows" in str(damage)
            files = Files(Place(written), "step_1", manifests.read(Place(written), "step_1"))
            with pytest.raises(Damaged):  # which resume passes over
                for name in files.manifest.tensors:
                    files.read(name)
    finally:
        path.write_bytes(data)
    assert damages(written) == []


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_truncated_manifest_is_detected(written, tmp_path, keep):
    shutil.copytree(written, tmp_path / "copy")
    path = tmp_path / "copy" / "step_1" / MANIFEST
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Damaged, match="cut short or changed"):
        manifests.read(Place(tmp_path / "copy"), "step_1")


def test_a_newer_version_is_refused_by_name(written, tmp_path):
    shutil.copytree(written, tmp_path / "copy")
    path = tmp_path / "copy" / "step_1" / MANIFEST
    body = path.read_bytes()[: -manifests._TAIL].replace(b'"version":1', b'"version":2', 1)
    path.write_bytes(manifests._sealed(body))
    with pytest.raises(UserError, match=r"step_1/manifest\.json: version 2, this tablemesh reads up to 1; upgrade"):
        manifests.read(Place(tmp_path / "copy"), "step_1")


def test_missing_short_long_and_strange_files_are_named(written, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    data = sorted((folder / "step_1").glob("rank_*.bin"))
    assert len(data) == 2
    data[0].unlink()
    data[1].write_bytes(data[1].read_bytes()[:-1])
    found = damages(folder)
    assert {damage.file for damage in found} == {p.name for p in data}
    assert any("the file is missing" in str(damage) for damage in found)
    assert any("ends at byte" in str(damage) for damage in found)
    (folder / "step_1" / "core").write_text("?")
    assert any("not a file of this checkpoint" in str(damage) for damage in damages(folder))
    shutil.rmtree(folder / "step_1")
    shutil.copytree(written / "step_1", folder / "step_1")
    with open(folder / "step_1" / data[0].name, "ab") as file:
        file.write(b"x")
    assert [damage.file for damage in damages(folder)] == [data[0].name]


def resume_auto(folder):
    """What `resume` takes and what it passes over; loading reads every byte."""
    place, loaded = Place(folder), []

    def load(chain):
        parts = [p for name, shape in TABLES.items() for p in checkpoints.row_parts(name, torch.zeros(shape))]
        chain.load(parts)
        loaded.append([part.tensor for part in parts])

    try:
        chosen = restore.resume("auto", place, load, lambda manifest: None)
    except UserError as error:
        return str(error), ()
    return chosen.chain and chosen.chain.name, chosen.passed_over


def test_resume_passes_over_the_damaged_and_says_why(written, tmp_path):
    for step in (1, 2, 3, 4):
        shutil.copytree(written / "step_1", tmp_path / f"step_{step}")
    (tmp_path / "step_9.partial").mkdir()
    path = next((tmp_path / "step_4").glob("rank_1*.bin"))
    path.write_bytes(path.read_bytes()[:99] + b"!" + path.read_bytes()[100:])
    (tmp_path / "step_3" / MANIFEST).write_bytes(b"{}")
    next((tmp_path / "step_2").glob("rank_0*.bin")).unlink()
    for name, passed in run_ranks(resume_auto, 2, tmp_path):
        assert name == "step_1"
        assert [text.partition(":")[0] for text in passed] == ["step_4", "step_3", "step_2"]
        assert "table 'item'" in passed[0] and "hash differs" in passed[0]
        assert "cut short or changed" in passed[1]
        assert "the file is missing" in passed[2]


def test_resume_with_nothing_whole(written, tmp_path):
    assert run_ranks(resume_auto, 1, tmp_path) == [(None, ())]
    shutil.copytree(written / "step_1", tmp_path / "step_1")
    (tmp_path / "step_1" / MANIFEST).write_bytes(b"")
    ((message, _),) = run_ranks(resume_auto, 1, tmp_path)
    assert "all 1 checkpoints are damaged" in message and "without --resume" in message


def make_saver(folder, log_dir, **options):
    world = World.from_env()
    return Saver(Place(folder), Checkpoint(**options), world, RunLog(log_dir, enabled=world.is_first))


def save(saver, step, *, must=False, rows=6400):
    """A checkpoint of this many rows of 8 columns on every rank."""
    parts = checkpoints.row_parts("user", checkpoints.table(rows, 8, seed=step))

    def about(files, tensors):
        return manifests.Manifest(
            position=checkpoints.position(step), config="", values={}, files=files, tensors=tensors
        )

    saver.save(lambda: parts, about, step=step, must=must)


def events(log_dir):
    return (log_dir / "metrics.jsonl").read_text()


def keep_some(folder, log_dir):
    saver = make_saver(folder, log_dir, keep=2, keep_every=3)
    for step in range(1, 9):
        save(saver, step)
    saver.wait()
    return saver.place.names(), saver.totals.saved


def test_the_newest_and_every_nth_stay(tmp_path):
    for names, saved in run_ranks(keep_some, 2, tmp_path / "c", tmp_path):
        assert names == ["step_3", "step_6", "step_7", "step_8"] and saved == 8


def fail_on_the_last_rank(folder, log_dir):
    """A save whose last rank cannot write, between two that go well: what is raised, and what there is then."""
    saver = make_saver(folder, log_dir)
    save(saver, 1)
    saver.wait()
    create = Place.create

    def full(self, name, file, **options):
        if dist.get_rank() == dist.get_world_size() - 1:
            raise OSError(errno.ENOSPC, "No space left on device", file)
        return create(self, name, file, **options)

    Place.create = full
    save(saver, 2)
    saver.wait()
    try:
        save(saver, 3, must=True)
    except UserError as error:
        message = str(error)
    Place.create = create
    dist.barrier()
    there = sorted(p.name for p in folder.iterdir())
    dist.barrier()
    save(saver, 4, must=True)
    return there, message, saver.place.names(), saver.totals.failed


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_failing_writer_harms_neither_the_run_nor_what_was_saved(tmp_path, world_size):
    for there, message, names, failed in run_ranks(fail_on_the_last_rank, world_size, tmp_path / "c", tmp_path):
        assert there == ["step_1"] and names == ["step_1", "step_4"] and failed == 2
        for word in ("step_3", f"rank {world_size - 1}", "No space left on device", "the 1 finished checkpoint"):
            assert word in message
    assert "training goes on" in events(tmp_path)


def save_until_full(folder, log_dir):
    """Checkpoints of 4 MiB on a disk of 48 MiB, none ever deleted: the space check ends it; then it is switched off."""
    saver = make_saver(folder, log_dir, keep=100)
    rows = (4 << 20) // 32
    for step in range(1, 12):
        save(saver, step, rows=rows)
        saver.wait()
    checked = list(saver.place.names())
    Saver._check_space = lambda self, save: None
    for step in range(12, 20):
        save(saver, step, rows=rows)
        saver.wait()
    names = saver.place.names()
    good = [n for n in names if not verify(saver.place, n, manifests.read(saver.place, n))]
    return checked, names, good, sorted(p.name for p in folder.iterdir())


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here: that needs root and CAP_SYS_ADMIN")
    try:
        ((checked, names, good, there),) = run_ranks(save_until_full, 1, disk / "c", tmp_path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert 3 <= len(checked) <= 8, "16 MiB stay free"
    assert len(names) > len(checked) and good == names == [n for n in names if n in there], "all that is there is whole"
    assert not any(n.endswith(".partial") for n in there)
    text = events(tmp_path)
    assert "are free in" in text and "No space left on device" in text


def save_read_only(folder, log_dir):
    saver = make_saver(folder, log_dir)
    try:
        save(saver, 1, must=True)
    except UserError as error:
        return str(error)


def test_a_folder_that_cannot_be_written(tmp_path):
    """A file where the folder should be: root may write into folders that are read-only."""
    (tmp_path / "c").write_text("")
    for message in run_ranks(save_read_only, 2, tmp_path / "c", tmp_path):
        assert "step_1: the checkpoint could not be written" in message
        assert "Not a directory" in message or "File exists" in message


def save_with_small_files(folder, log_dir):
    """The kernel lets this process write no file above 64 KiB while step 2 is saved."""
    saver = make_saver(folder, log_dir)
    save(saver, 1)
    saver.wait()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, most))
    save(saver, 2)
    saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    save(saver, 3, must=True)
    names = saver.place.names()
    return names, [n for n in names if not verify(saver.place, n, manifests.read(saver.place, n))], saver.totals.failed


def test_a_limit_on_the_size_of_files(tmp_path):
    (found,) = run_ranks(save_with_small_files, 1, tmp_path / "c", tmp_path)
    assert found == (["step_1", "step_3"], ["step_1", "step_3"], 1)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step_1", "step_3"]
    assert "File too large" in events(tmp_path) and "training goes on" in events(tmp_path)


def test_a_read_only_file_system(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a file system cannot be mounted here: that needs root and CAP_SYS_ADMIN")
    try:
        messages = run_ranks(save_read_only, 2, disk / "c", tmp_path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert all("step_1" in message and "Read-only file system" in message for message in messages)


def run_out_of_memory():
    """No more address space than a little: what this process then says of it."""
    used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        torch.zeros(1 << 28)  # 1 GiB
    except RuntimeError as error:
        return _classify(error)


def test_a_rank_without_memory_is_named_so():
    ((kind, message),) = run_ranks(run_out_of_memory, 1)
    assert kind == "memory" and "memory ran out" in message and "use smaller tables or batches" in message


def die_between_the_renames(folder):
    """A writer that dies after it has moved the old checkpoint of this name away: the old one comes back."""
    write_two(folder, 5)
    if dist.get_rank() == 0:
        (folder / "step_5").rename(folder / "step_5.old")
    dist.barrier()
    write_two(folder, 6)
    return Place(folder).names()


def test_an_interrupted_replacement_is_undone(tmp_path):
    assert run_ranks(die_between_the_renames, 2, tmp_path) == [["step_5", "step_6"]] * 2
    assert damages(tmp_path, 5) == []


def save_to_memory():
    place = Place("memory://bucket/run")
    parts = checkpoints.row_parts("user", checkpoints.table(99, 8))
    checkpoints.write(place, 3, parts)
    checkpoints.write(place, 12, parts)
    files = checkpoints.files_of(place, 12)
    assert torch.equal(files.read("tables/user/weight"), checkpoints.table(99, 8))
    assert verify(place, "step_12", files.manifest) == []
    before = place.names()
    place.remove("step_3")
    fs, path = place._fs, place.path("step_12", "rank_0.0.bin")
    data = bytearray(fs.cat_file(path))
    data[77] ^= 1
    fs.pipe_file(path, bytes(data))
    return before, place.names(), [str(d) for d in verify(place, "step_12", files.manifest)]


def test_a_fsspec_url():
    ((before, after, damaged),) = run_ranks(save_to_memory, 1)
    assert before == ["step_3", "step_12"] and after == ["step_12"]
    assert len(damaged) == 1 and "table 'user'" in damaged[0]
    with pytest.raises(UserError, match="fsspec cannot open it"):
        Place("nosuch://bucket")


def test_the_room_of_a_file_system_that_is_gone_is_unknown(tmp_path, monkeypatch):
    def gone(path):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(shutil, "disk_usage", gone)
    assert Place(tmp_path / "c").free_bytes() is None
