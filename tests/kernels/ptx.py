"""`python -m tests.kernels.ptx 80 90`: compile every Triton kernel that a set of specs launches, without a GPU.

The host code runs as it is; in place of a launch, each kernel is compiled for the arguments it was given, down to the
GPU's own code by ptxas.  Prints one JSON object a kernel: kernel, capability, spec, and its kinds of loads.

Of a kernel whose tiles are tuned, all of them are compiled for the first spec that launches it with so many ids at a
time, the first one alone for the others.
"""

import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from kernels import interaction
from kernels.backends.triton import Kernel
from kernels.id_maps import triton as id_maps
from kernels.id_maps.base import Policy
from kernels.interactions import triton as interactions
from kernels.ops import STATES, Optimizer, Spec, State, Table

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def specs() -> dict[str, Spec]:
    def tables(*dims: int) -> tuple[Table, ...]:
        return tuple(Table(rows=100 + dim, dim=dim) for dim in dims)

    made = {f"{kind} 64": Spec(tables=tables(64), optimizer=Optimizer(kind=kind)) for kind in STATES}
    made |= {
        "widths": Spec(tables=tables(1, 17, 100, 256, 4096), features=(4, 3, 2, 1, 0)),
        "unaligned": Spec(tables=tables(3, 32), packed=True),
        "mean weighted bf16": Spec(
            tables=tables(64, 128),
            pooling="mean",
            weighted=True,
            weights=torch.bfloat16,
            output=torch.bfloat16,
            optimizer=Optimizer(kind="rowwise_adam", weight_decay=0.1, decay="l2", max_gradient=1.0, max_norm=1.0),
        ),
        "fp16": Spec(tables=tables(64), weights=torch.float16, optimizer=Optimizer(kind="adam", max_gradient=1.0)),
        "unpooled": Spec(tables=tables(64, 64), pooling="none", weighted=True),
    }
    return made


def compiled(kernel: JITFunction, capability: int, args: tuple, kwargs: dict) -> dict:
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | kwargs
    options = {"num_warps": given.pop("num_warps", 4)}
    for unused in ("num_ctas", "num_stages", "maxnreg"):
        given.pop(unused, None)
    assert set(given) == set(names), f"{kernel.__name__}: {set(given) ^ set(names)}"
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        value = given[name]
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"
    source = ASTSource(kernel, signature, {(names.index(name),): given[name] for name in constants}, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    loads = re.findall(r"ld\.global[.\w]*", made.asm["ptx"])
    assert made.asm["cubin"]
    return {"kernel": kernel.__name__, "capability": capability, "loads": sorted(set(loads)), **options}


def main(capabilities: list[int]) -> None:
    found: list[dict] = []

    def run(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
        found.extend(compiled(self, capability, args, kwargs) for capability in capabilities)

    tuned = set()

    def tune(self: Autotuner, *args, **kwargs) -> None:
        kind = (self.fn, self.configs[0].kwargs.get("UNROLL"))
        for config in self.configs[:1] if kind in tuned else self.configs:
            self.fn.run(*args, **kwargs, **config.all_kwargs())
        tuned.add(kind)

    JITFunction.run, Autotuner.run = run, tune
    for name, spec in specs().items():
        kernel = Kernel(spec, State(spec))
        kernel.interpreted = False
        for per_bag in (1, 2) if name == "sgd 64" else (2,):
            bags = 8192 if name == "sgd 64" else 64  # enough for pieces of pieces, or for pieces
            offsets = torch.arange(len(spec.features) * bags + 1) * per_bag
            ids_N = torch.zeros(int(offsets[-1]), dtype=torch.int64)
            weights_N = torch.ones(len(ids_N)) if spec.weighted else None
            out = kernel.forward(ids_N, offsets, weights_N)
            kernel.backward_update(torch.zeros_like(out), ids_N, offsets, weights_N, weights_grad=spec.weighted)
        tell(name, found)
    # Products of 128 float32 vectors are unrolled into so many instructions that they alone would take a minute.
    both, narrow = (torch.float32, torch.bfloat16), (torch.bfloat16,)
    for features, dim, dense, dtypes in (
        (26, 64, True, both),
        (3, 20, False, both),
        (50, 128, True, both),
        (100, 128, True, narrow),
    ):
        for dtype in dtypes:
            op = interactions.Kernel(interaction.Spec(features=features, dim=dim, dense=dense))
            dense_BD = torch.zeros(2, dim, dtype=dtype) if dense else None
            emb_BX = torch.zeros(2, features * dim, dtype=dtype)
            op.backward(op.forward(dense_BD, emb_BX), dense_BD, emb_BX)
            tell(f"{features} vectors of {dim} {dtype}", found)
    for evict in ("lru", "lfu"):
        policy = Policy(limit=1000, admit_after=3, evict=evict, seed=2**64 - 1)
        ids = id_maps.Store(policy, first_part=3, parts=7, name="", device=torch.device("cpu"))
        ids.block, ids.groups, ids.most_uses = id_maps.BLOCK, id_maps.GROUPS, 2**31 - 1
        ids_N = torch.arange(1000)
        ids.find(ids_N)
        ids._find(ids_N, clock=2**32 - 1, touch=True)
        ids._put(ids_N, ids_N)
        ids._count(torch.zeros(0, dtype=torch.int64), id_maps._Same(*[torch.zeros(0, dtype=torch.int64)] * 2))
        tell(f"id map, {evict}", found)


def tell(name: str, found: list[dict]) -> None:
    for line in found:
        print(json.dumps({"spec": name, **line}), flush=True)
    found.clear()


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
