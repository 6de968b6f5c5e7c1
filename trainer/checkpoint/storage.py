"""torch.distributed.checkpoint plans who writes and reads what; our files hold it.

    write(parts, place, name, ...)     all ranks together; the checkpoint exists when it returns
    read_into(parts, files, ...)       all ranks together, whatever world size and plan wrote it

A `Part` is a box of a named global tensor that a rank holds.  Equal boxes of several ranks (dense weights) are written
once, by the rank that DCP gives them to.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    LoadPlan,
    SavePlan,
    create_default_global_load_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from kernels.errors import UserError
from trainer.checkpoint.agree import shared
from trainer.checkpoint.files import READERS, Files, write_tensor
from trainer.checkpoint.manifest import DTYPES, Chunk, Entry, Manifest
from trainer.checkpoint.place import Place

FILE_BYTES = 128 << 20  # a rank's file is closed once it is this large
WRITERS = 2  # files that a rank writes at a time: one is copied and hashed while the disk has the other's bytes


@dataclass(frozen=True, kw_only=True)
class Part:
    """name, size: of the global tensor.  offset: where this box begins in it.  table: whose it is, None for dense ones.

    tensor: the box itself, updated in place by the run.  copied: it is a copy already, which nobody updates.
    watched: a Snapshot keeps what its rows hold, so that it may be copied while the steps go on.
    make: called for the values when they are written, where `tensor` gives only their shape and dtype (on "meta").
    """

    name: str
    size: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor
    table: str | None = None
    copied: bool = False
    watched: bool = False
    make: Callable[[], Tensor] | None = None

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.name, self.offset)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=self.tensor.size())

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


def whole(name: str, tensor: Tensor) -> Part:
    """A tensor that this rank holds all of."""
    return Part(name=name, size=tuple(tensor.shape), offset=(0,) * tensor.dim(), tensor=tensor)


def write(
    parts: Sequence[Part], place: Place, name: str, about: Callable[[dict, dict], Manifest], *, group: Any = None
) -> Manifest | None:
    """Write all ranks' parts; the manifest on rank 0, None on the others.

    about(files, tensors) -> Manifest: called on rank 0 when all files are on the disk.
    Raises what the first failing rank raised, on all ranks; nothing is left of the checkpoint then.
    """
    writer = _Writer(place, name, about)
    try:
        dcp.save({}, storage_writer=writer, planner=_SavePlanner(parts), process_group=group)
    except dcp.api.CheckpointException as error:
        if writer.first:
            place.abandon(name)
        raise first_cause(error) from error
    return writer.manifest


def write_alone(
    parts_of_rank: Sequence[Sequence[Part]], place: Place, name: str, about: Callable[[dict, dict], Manifest]
) -> Manifest:
    """What `write` would leave if so many ranks had these parts, written by this process alone, one after the other."""
    writer = _Writer(place, name, about)
    planners = [_SavePlanner(parts) for parts in parts_of_rank]
    try:
        writer.set_up_storage_writer(True)
        plans, metadata = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
        plans = writer.prepare_global_plan(plans)
        results = [writer.write_data(plan, p).value() for plan, p in zip(plans, planners, strict=True)]
        writer.finish(metadata, results)
    except BaseException:
        place.abandon(name)
        raise
    assert writer.manifest is not None
    return writer.manifest


def read_into(parts: Sequence[Part], files: Files, *, group: Any = None) -> None:
    """Fill the parts' tensors in place.  Raises Damaged, or UserError for a tensor that is missing or has another size,
    on all ranks alike."""
    try:
        dcp.load({}, storage_reader=_Reader(files), planner=_LoadPlanner(parts), process_group=group)
    except dcp.api.CheckpointException as error:
        raise first_cause(error) from error


def first_cause(error: dcp.api.CheckpointException) -> Exception:
    """What the first failing rank raised, with its number in front."""
    rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
    return shared(inner, rank)


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = {part.index: part for part in parts}

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=part.index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=part.chunk,
                    properties=TensorProperties(dtype=part.tensor.dtype),
                    size=torch.Size(part.size),
                ),
            )
            for part in self.parts.values()
        ]
        tables = {part.name: part.table for part in self.parts.values()}
        self.plan = SavePlan(items, planner_data=tables)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        tables = {name: table for plan in all_plans for name, table in plan.planner_data.items()}
        plans, metadata = super().create_global_plan(all_plans)
        return [replace(plan, planner_data=None) for plan in plans], replace(metadata, planner_data=tables)

    def part(self, item: WriteItem) -> Part:
        return self.parts[item.index]


@dataclass(frozen=True)
class _Box:
    """Rows of a part that are written in one file."""

    part: Part
    rows: slice  # relative to the part
    nbytes: int


def _boxes(part: Part) -> list[_Box]:
    """A large part in boxes of FILE_BYTES, so that several writers share a table; one that is made is small."""
    if not part.tensor.numel() or not part.size or part.make:
        return [_Box(part, slice(0, part.tensor.shape[0] if part.size else 1), part.nbytes)]
    rows, row = part.tensor.shape[0], part.nbytes // part.tensor.shape[0]
    step = max(1, FILE_BYTES // row)
    return [
        _Box(part, slice(first, min(first + step, rows)), (min(first + step, rows) - first) * row)
        for first in range(0, rows, step)
    ]


class _Writer(StorageWriter):
    def __init__(self, place: Place, name: str, about: Callable[[dict, dict], Manifest]) -> None:
        self.place, self.name, self.about = place, name, about
        self.first = False
        self.manifest: Manifest | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.first = is_coordinator
        if is_coordinator:
            self.place.begin(self.name)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: Any) -> Future:
        """This rank's parts, a table's side by side, in files rank_R.0.bin, rank_R.1.bin, ...; WRITERS at a time."""
        items = sorted(plan.items, key=lambda item: (planner.part(item).table or "", item.index.fqn, item.index.offset))
        files: list[list[_Box]] = []
        room = 0
        for box in (box for item in items for box in _boxes(planner.part(item))):
            if room <= 0:
                files.append([])
                room = FILE_BYTES
            files[-1].append(box)
            room -= box.nbytes
        names = [f"rank_{plan.storage_data}.{number}.bin" for number in range(len(files))]
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="tablemesh-write") as pool:
            results = [result for of_file in pool.map(self._write_file, names, files) for result in of_file]
        done: Future = Future()
        done.set_result(results)
        return done

    def _write_file(self, file: str, boxes: Sequence["_Box"]) -> list[WriteResult]:
        results, at = [], 0
        with self.place.create(self.name, file) as out:
            for box in boxes:
                part = box.part
                tensor = (part.make() if part.make else part.tensor[box.rows] if part.size else part.tensor).detach()
                tensor = tensor.to("cpu").contiguous()
                rows, hashes = write_tensor(out, tensor)
                chunk = Chunk(
                    offset=(part.offset[0] + box.rows.start, *part.offset[1:]) if part.size else (),
                    size=tuple(tensor.shape),
                    file=file,
                    at=at,
                    piece_rows=rows,
                    hashes=tuple(hashes),
                )
                results.append(WriteResult(index=part.index, size_in_bytes=box.nbytes, storage_data=chunk))
                at += box.nbytes
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, int] = {}
        chunks: dict[str, list[Chunk]] = {}
        for result in (result for of_rank in results for result in of_rank):
            chunk = result.storage_data
            files[chunk.file] = files.get(chunk.file, 0) + result.size_in_bytes
            chunks.setdefault(result.index.fqn, []).append(chunk)
        tensors = {
            name: Entry(
                dtype=str(stored.properties.dtype).removeprefix("torch."),
                size=tuple(stored.size),
                table=metadata.planner_data[name],
                chunks=tuple(sorted(chunks[name], key=lambda chunk: chunk.offset)),
            )
            for name, stored in sorted(metadata.state_dict_metadata.items())
        }
        self.manifest = self.about(dict(sorted(files.items())), tensors)
        self.place.publish(self.name, self.manifest.to_bytes())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _Reader(StorageReader):
    def __init__(self, files: Files) -> None:
        self.files = files

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {
            name: TensorStorageMetadata(
                properties=TensorProperties(dtype=DTYPES[entry.dtype]),
                size=torch.Size(entry.size),
                chunks=[ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.size)) for c in entry.chunks],
            )
            for name, entry in self.files.manifest.tensors.items()
        }
        return Metadata(state_dict_metadata=tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future:
        tensors = self.files.manifest.tensors
        chunks = {(name, chunk.offset): chunk for name, entry in tensors.items() for chunk in entry.chunks}

        def read(item: ReadItem) -> None:
            name, offset = item.storage_index.fqn, tuple(item.storage_index.offset or ())
            into = planner.resolve_tensor(item).detach()
            self.files.read_box(name, chunks[name, offset], tuple(item.storage_offsets), tuple(item.lengths), into)

        # Without gradients: a part may be a parameter, and each thread has a mode of its own.
        with ThreadPoolExecutor(READERS, initializer=torch.set_grad_enabled, initargs=(False,)) as pool:
            for _ in pool.map(read, plan.items):
                pass
        done: Future = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _LoadPlanner(LoadPlanner):
    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = {part.index: part for part in parts}
        self.metadata: Metadata | None = None

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for part in self.parts.values():
            stored = self.metadata.state_dict_metadata.get(part.name)
            if stored is None:
                raise UserError(f"{part.name} is not in the checkpoint: it was written by another model or optimizer")
            if tuple(stored.size) != part.size:
                raise UserError(f"{part.name} has the size {tuple(stored.size)} in the checkpoint and {part.size} here")
            items += create_read_items_for_chunk_list(part.name, stored, [part.chunk])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return create_default_global_load_plan(global_plan)

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("a checkpoint holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor = self.parts[read_item.dest_index].tensor.detach()
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
