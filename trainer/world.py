"""This process among the ranks: read from the environment once, in one value."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from kernels.errors import UserError
from trainer import store as stores


@dataclass(frozen=True, kw_only=True)
class World:
    rank: int
    size: int
    local_rank: int  # among the ranks of this host
    local_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_env(cls) -> "World":
        """The world that torch's launcher describes; alone when there is none. Where there are GPUs a rank has one."""
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if local_size > torch.cuda.device_count():
                raise UserError(
                    f"{local_size} ranks on this host, which has {torch.cuda.device_count()} GPUs; "
                    f"use --nproc {torch.cuda.device_count()}, or CUDA_VISIBLE_DEVICES='' to train on the CPU"
                )
            device = torch.device("cuda", local_rank)
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=local_rank,
            local_size=local_size,
            device=device,
        )

    def connect(self, timeout_seconds: int) -> dist.Store:
        """Join the process group: NCCL for GPUs (with gloo beside it for CPU tensors), gloo otherwise.

        timeout_seconds: how long a collective may take before the run ends with an error. Returns the ranks' store.
        """
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        limit = timedelta(seconds=timeout_seconds)
        if "RANK" not in os.environ:
            store = dist.HashStore()
        elif path := stores.path_from_env():
            store = stores.open_store(path, rank=self.rank, limit=limit)
        else:
            store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=limit)
        return store
