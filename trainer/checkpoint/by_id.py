"""What a checkpoint holds of the tables whose rows are given to ids (sharding/by_id.py): id maps and the rows in use.

    tables/TABLE/parts:P0-P1/weight, STATE     (R, D) or (R,) rows 0 .. R-1 of the rank with the parts P0 .. P1-1 of ids
    tables/TABLE/parts:P0-P1/scale             (R,) of rows of int8
    tables/TABLE/parts:P0-P1/id, clock, uses   (R,) int64: whose a row is, when it was last seen, and how often
    tables/TABLE/parts:P0-P1/updates           (R,) int32, where the run counts in how many steps a row was updated
    tables/TABLE/parts:P0-P1/free              -1, then the free rows in the order in which they are given, last first
    tables/TABLE/parts:P0-P1/filter, counted   the counting filter, where ids wait for admission
    tables/TABLE/parts:P0-P1/about, counts, age

R is the highest row ever given there and one more, so what was never used is not written.  A delta has of the first
four lines the rows that were touched, tables/TABLE/parts:P0-P1/delta:0-0:R/WHAT, and all of the others.  Free rows
may hold anything.

The same ranks go on from this exactly, row for row; another number of ranks gives the ids new rows (kernels.id_map's
`reshard`), so that every id keeps its vector, its states, its age and its count.

Shapes: R rows, U rows of a delta, K ids with rows, J free rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.errors import UserError
from kernels.id_map import reshard
from kernels.id_maps.base import COUNTERS
from sharding.by_id import ByIdBag, GivenRows
from sharding.compute_kernel import STATE_NAMES
from sharding.plan import embeddings_of
from sharding.table_state import SCALE, WEIGHT
from sharding.touched import Key
from sharding.update_counts import UPDATES
from trainer.checkpoint.chain import Chain, steps
from trainer.checkpoint.storage import Part, whole

PARTS_OF = "/parts:"
NOT_STATES = (SCALE, UPDATES, "id", "clock", "uses", "free", "filter", "counted", "about", "counts", "age")
OF_ROWS = {"id": "ids_K", "clock": "clocks_K", "uses": "uses_K"}  # as kernels.id_map names them


def given_rows(model: nn.Module) -> Iterator[tuple[ByIdBag, GivenRows]]:
    """Those of this rank, with the kernel that has them."""
    collection = embeddings_of(model.module).ebc_by_id
    for kernel in collection.kernels if collection is not None else ():
        for given in kernel.rows:
            yield kernel, given


def parts_of(model: nn.Module, touched: Mapping[Key, Tensor] | None) -> list[Part]:
    """Copies of this rank's maps and rows; touched: rows of each table part since the last save, for a delta."""
    found = []
    for kernel, given in given_rows(model):
        name, rows = given.table.name, given.map.top + 1
        tensors = _rows(kernel, given)
        state = given.map.state_dict()
        prefix = _prefix(given)
        for what in OF_ROWS:
            tensors[what] = torch.zeros(rows, dtype=torch.int64)
            tensors[what][state["rows_K"]] = state[OF_ROWS[what]]
        if touched is None:
            written = {f"{prefix}/{what}": tensor[:rows].clone() for what, tensor in tensors.items()}
        else:
            rows_U = torch.cat([at.cpu() for (table, _, _), at in touched.items() if table == name])
            # Row 0 may have changed where no id of this rank read it.
            rows_U = torch.unique(torch.cat([torch.zeros(1, dtype=torch.int64), rows_U]))
            rows_U = rows_U[rows_U < rows]
            delta = f"{prefix}/delta:0-0:{rows}"
            written = {
                f"{delta}/{what}": tensor.index_select(0, rows_U.to(tensor.device)) for what, tensor in tensors.items()
            }
            written[f"{delta}/rows"] = rows_U
        written[f"{prefix}/free"] = nn.functional.pad(state["free_J"], (1, 0), value=-1)
        for what in ("counted_P", "about", "counts"):
            written[f"{prefix}/{what.removesuffix('_P')}"] = state[what]
        if state["filter_PHLC"].numel():
            written[f"{prefix}/filter"] = state["filter_PHLC"]
        written[f"{prefix}/age"] = given.age.state()
        found += [replace(whole(key, tensor), table=name, copied=True) for key, tensor in written.items()]
    return found


@torch.no_grad()
def load(model: nn.Module, chain: Chain, *, with_states: bool) -> list[str]:
    """Fill this rank's maps and rows, from any number of ranks; the tables that the checkpoint does not have this way.

    Raises UserError where an id would find no row, or for another optimizer; Damaged.
    """
    missing = []
    for kernel, given in given_rows(model):
        prefixes = stored(chain, given.table.name)
        if not prefixes:
            missing.append(given.table.name)
        elif _prefix(given) in prefixes:
            _load_same(kernel, given, chain, with_states=with_states)
        else:
            _load_resharded(kernel, given, chain, prefixes, with_states=with_states)
    return missing


def stored(chain: Chain, table: str) -> list[str]:
    """tables/TABLE/parts:P0-P1 of every rank that wrote, in order of their parts."""
    start = f"tables/{table}{PARTS_OF}"
    found = {name.rpartition("/")[0] for name in chain.tensors if name.startswith(start) and name.endswith("/about")}
    return sorted(found, key=lambda prefix: int(prefix.removeprefix(start).split("-")[0]))


def state_of(chain: Chain, prefix: str, *, lines: int) -> dict[str, Tensor]:
    """What IdMap.load_state_dict takes.  lines: of the counting filter."""
    about = chain.read(f"{prefix}/about")
    free_J = chain.read(f"{prefix}/free")[1:]
    rows_K = live_rows(chain, prefix)
    of_rows = {key: chain.read(f"{prefix}/{what}")[rows_K] for what, key in OF_ROWS.items()}
    filtered = f"{prefix}/filter" in chain.tensors
    shape = (int(about[3]), 2, lines, COUNTERS)
    return {
        **of_rows,
        "rows_K": rows_K,
        "free_J": free_J,
        "filter_PHLC": chain.read(f"{prefix}/filter") if filtered else torch.zeros(shape, dtype=torch.uint8),
        "counted_P": chain.read(f"{prefix}/counted"),
        "about": about,
        "counts": chain.read(f"{prefix}/counts"),
    }


def live_rows(chain: Chain, prefix: str) -> Tensor:
    """(K,) the rows that belong to ids, ascending."""
    is_live_R = torch.ones(int(chain.read(f"{prefix}/about")[0]) + 1, dtype=torch.bool)
    is_live_R[0] = False
    is_live_R[chain.read(f"{prefix}/free")[1:]] = False
    return is_live_R.nonzero().flatten()


def owners(chain: Chain, prefix: str) -> list[int | None]:
    """Whose each row is; None: nobody's, as the default row."""
    ids_R = chain.read(f"{prefix}/id").tolist()
    live = set(live_rows(chain, prefix).tolist())
    return [id if row in live else None for row, id in enumerate(ids_R)]


def _prefix(given: GivenRows) -> str:
    first = given.map.first_part
    return f"tables/{given.table.name}{PARTS_OF}{first}-{first + given.map.parts}"


def _rows(kernel: ByIdBag, given: GivenRows) -> dict[str, Tensor]:
    """Views of the weights and the states, as they are named everywhere."""
    names = STATE_NAMES[kernel.bags.spec.optimizer.kind]
    scales = {} if given.scales_E is None else {SCALE: given.scales_E}
    counts = {} if given.counts_E is None else {UPDATES: given.counts_E}
    return {WEIGHT: given.weights_ED} | scales | dict(zip(names, given.states, strict=True)) | counts


def _read_rows(chain: Chain, name: str) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a stored tensor, in pieces."""
    entry = chain.tensors.get(name)
    if entry is None:
        raise UserError(f"{name} is not in the checkpoint: it was written with another table optimizer")
    for first, end in steps(entry):
        yield first, chain.read(name, rows=(first, end))


def _wanted(kernel: ByIdBag, given: GivenRows, chain: Chain, prefix: str, *, with_states: bool) -> dict[str, Tensor]:
    tensors = _rows(kernel, given)
    if UPDATES in tensors and f"{prefix}/{UPDATES}" not in chain.tensors:
        tensors.pop(UPDATES).zero_()
    return tensors if with_states else {what: tensors[what] for what in (WEIGHT, SCALE) if what in tensors}


def _load_same(kernel: ByIdBag, given: GivenRows, chain: Chain, *, with_states: bool) -> None:
    prefix = _prefix(given)
    given.map.load_state_dict(state_of(chain, prefix, lines=given.by_id.policy.lines))
    given.age.load(chain.read(f"{prefix}/age"))
    for what, tensor in _wanted(kernel, given, chain, prefix, with_states=with_states).items():
        for first, values in _read_rows(chain, f"{prefix}/{what}"):
            _check_columns(given, tensor, values)
            tensor[first : first + len(values)].copy_(values)


def _load_resharded(kernel: ByIdBag, given: GivenRows, chain: Chain, prefixes: list[str], *, with_states: bool) -> None:
    policy = given.by_id.policy
    states = [state_of(chain, prefix, lines=policy.lines) for prefix in prefixes]
    found = reshard(states, policy=policy, ranks=given.ranks, name=given.table.name)[given.rank]
    given.map.load_state_dict(found.state)
    given.age.load(chain.read(f"{prefixes[0]}/age"))
    for what, tensor in _wanted(kernel, given, chain, prefixes[0], with_states=with_states).items():
        for old, prefix in enumerate(prefixes):
            into_K = (found.from_rank_K == old).nonzero().flatten()
            from_K = found.from_row_K[into_K]
            for first, values in _read_rows(chain, f"{prefix}/{what}"):
                _check_columns(given, tensor, values)
                here_K = (from_K >= first) & (from_K < first + len(values))
                tensor[1 + into_K[here_K]] = values[from_K[here_K] - first].to(tensor.device)
                if first == 0 and old == 0:
                    tensor[0] = values[0]


def _check_columns(given: GivenRows, tensor: Tensor, values: Tensor) -> None:
    if tensor.shape[1:] != values.shape[1:] or tensor.dtype != values.dtype:
        raise UserError(
            f"table {given.table.name!r}: a row is {tuple(values.shape[1:])} of {values.dtype} in the checkpoint and "
            f"{tuple(tensor.shape[1:])} of {tensor.dtype} here; use the same dim and row_type"
        )
