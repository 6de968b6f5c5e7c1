"""Checkpoints without a training run: parts of made-up tensors, written and read on the ranks that are up."""

import torch
import torch.distributed as dist

from trainer.checkpoint import manifest as manifests
from trainer.checkpoint import storage
from trainer.checkpoint.files import Files
from trainer.checkpoint.manifest import Manifest, Position
from trainer.checkpoint.place import Place
from trainer.checkpoint.storage import Part


def position(step: int) -> Position:
    world = dist.get_world_size()
    return Position(step=step, epoch=0, samples=step, world_size=world, config_sha256="c", data_fingerprint="d")


def table(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def row_parts(name: str, whole: torch.Tensor) -> list[Part]:
    """This rank's rows of a table, in pieces as even as they get; `whole` is the same on all ranks."""
    rows = -(-len(whole) // dist.get_world_size())
    first = dist.get_rank() * rows
    mine = whole[first : first + rows].clone()
    return [Part(name=f"tables/{name}/weight", size=tuple(whole.shape), offset=(first, 0), tensor=mine, table=name)]


def write(place: Place, step: int, parts: list[Part]) -> Manifest | None:
    def about(files, tensors):
        return Manifest(position=position(step), config="", values={}, files=files, tensors=tensors)

    return storage.write(parts, place, f"step_{step}", about)


def files_of(place: Place, step: int) -> Files:
    name = f"step_{step}"
    return Files(place, name, manifests.read(place, name))
