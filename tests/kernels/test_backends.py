"""Every backend in kernels/backends/ does what the reference does; a new file there is tested without a change here."""

import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import registry
from kernels.errors import UserError
from kernels.ops import Optimizer, Spec, State, Table, TableBatchedEmbeddingBag
from tests.kernels.cases import INTERPRETED, assert_close, batch, fill, run, serves

BACKENDS = registry.names("kernels.backends")
TABLES = (Table(rows=13, dim=16), Table(rows=101, dim=4), Table(rows=1, dim=4))  # few widths: each is compiled
FEATURES = (0, 1, 0, 2, 1)  # two tables have two features each
STEPS = 2 if INTERPRETED else 3

OPTIMIZERS = {
    "sgd": Optimizer(kind="sgd", lr=0.1),
    "sgd l2": Optimizer(kind="sgd", lr=0.1, weight_decay=0.1, decay="l2"),
    "adagrad": Optimizer(kind="adagrad", lr=0.1),
    "adagrad l2": Optimizer(kind="adagrad", lr=0.1, weight_decay=0.1, decay="l2"),
    "rowwise_adagrad": Optimizer(kind="rowwise_adagrad", lr=0.1),
    "rowwise_adagrad l2": Optimizer(kind="rowwise_adagrad", lr=0.1, weight_decay=0.1, decay="l2"),
    "rowwise_adagrad decoupled": Optimizer(kind="rowwise_adagrad", lr=0.1, weight_decay=0.1, decay="decoupled"),
    "rowwise_adagrad max_norm": Optimizer(kind="rowwise_adagrad", lr=0.1, max_norm=0.4),
    "adam": Optimizer(kind="adam", lr=0.1, eps=1e-4),
    "adam l2": Optimizer(kind="adam", lr=0.1, eps=1e-4, weight_decay=0.1, decay="l2"),
    "adam decoupled": Optimizer(kind="adam", lr=0.1, eps=1e-4, weight_decay=0.1, decay="decoupled"),
    "rowwise_adam": Optimizer(kind="rowwise_adam", lr=0.1, eps=1e-4),
    "rowwise_adam l2": Optimizer(kind="rowwise_adam", lr=0.1, eps=1e-4, weight_decay=0.1, decay="l2"),
    "rowwise_adam decoupled": Optimizer(kind="rowwise_adam", lr=0.1, eps=1e-4, weight_decay=0.1, decay="decoupled"),
    "sgd max_gradient": Optimizer(kind="sgd", lr=0.1, max_gradient=0.5, max_norm=0.4),
    "rowwise_adagrad max_gradient": Optimizer(kind="rowwise_adagrad", lr=0.1, max_gradient=0.5),
}


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request, monkeypatch):
    """One backend; every tensor it makes without filling it holds NaN."""
    empty = torch.empty

    def poisoned(*size, **kinds):
        tensor = empty(*size, **kinds)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-7)

    monkeypatch.setattr(torch, "empty", poisoned)
    return request.param


def serve(backend: str, spec: Spec) -> Spec:
    """The spec, or with its features in the order of the tables where a backend needs that; skips where it refuses."""
    for case in (spec, replace(spec, features=tuple(sorted(spec.features)))):
        if serves(backend, case):
            return case
    pytest.skip(f"{backend} says why it does not")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(backend, name):
    spec = Spec(tables=TABLES, features=FEATURES, optimizer=OPTIMIZERS[name])
    spec = serve(backend, spec)
    assert_close(backend, spec, [batch(spec, bags=11, seed=seed) for seed in range(STEPS)])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("pooling", ["sum", "mean", "none"])
def test_pooling(backend, pooling, weighted):
    tables = TABLES if pooling != "none" else tuple(Table(rows=table.rows, dim=16) for table in TABLES)
    spec = Spec(tables=tables, features=FEATURES, pooling=pooling, weighted=weighted, optimizer=Optimizer(lr=0.1))
    spec = serve(backend, spec)
    assert_close(backend, spec, [batch(spec, bags=11, seed=seed) for seed in range(2)])


@pytest.mark.parametrize("dim", [1, 3, 4, 5, 16, 64, 127, 128, 256, 1025])
def test_widths(backend, dim):
    spec = Spec(tables=(Table(rows=17, dim=dim), Table(rows=5, dim=4)), optimizer=Optimizer(lr=0.1))
    spec = serve(backend, spec)
    assert_close(backend, spec, [batch(spec, bags=5, seed=seed) for seed in range(2)])


@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_dtypes(backend, weights, output, stochastic):
    tables = TABLES[:1] if output == torch.bfloat16 else TABLES[1:]
    features = tuple(f for f in FEATURES if f < len(tables))
    spec = Spec(tables=tables, features=features, weights=weights, output=output, stochastic=stochastic)
    spec = serve(backend, spec)
    assert_close(backend, spec, [batch(spec, bags=11, seed=seed) for seed in range(STEPS)])


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_index_types(backend, ids, offsets):
    spec = Spec(tables=TABLES[1:], features=(0, 1, 0))
    spec = serve(backend, spec)
    assert_close(backend, spec, [batch(spec, bags=7, ids=ids, offsets=offsets)])


@pytest.mark.parametrize(
    "shape",
    [{"bags": 1}, {"bags": 0}, {"bags": 6, "longest": 0}, {"bags": 31, "longest": 40}, {"bags": 9, "one_id": True}],
    ids=["one bag", "no bags", "no ids", "long bags", "one id"],
)
def test_awkward_batches(backend, shape):
    spec = Spec(tables=TABLES, features=FEATURES, optimizer=Optimizer(lr=0.1))
    spec = serve(backend, spec)
    assert_close(backend, spec, [batch(spec, seed=seed, **shape) for seed in range(2)])


def test_one_row_many_times(backend):
    """Thousands of occurrences of one row among others, and one table that has nearly all the work."""
    spec = Spec(
        tables=(Table(rows=5000, dim=4), Table(rows=3, dim=4)), features=(0, 1), optimizer=Optimizer(kind="sgd")
    )
    spec = serve(backend, spec)
    made = batch(spec, bags=300, longest=60)
    made.ids_N[: int(made.offsets[300])][::3] = 4999
    assert_close(backend, spec, [made])


@settings(max_examples=8 if INTERPRETED else 25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_anything(backend, data):
    dims = st.sampled_from([4, 16])
    tables = data.draw(st.lists(st.builds(Table, rows=st.integers(1, 40), dim=dims), min_size=1, max_size=4))
    features = data.draw(st.lists(st.integers(0, len(tables) - 1), min_size=1, max_size=5))
    spec = Spec(
        tables=tuple(tables),
        features=tuple(features),
        pooling=data.draw(st.sampled_from(["sum", "mean"])),
        weighted=data.draw(st.booleans()),
        optimizer=data.draw(st.sampled_from(list(OPTIMIZERS.values()))),
    )
    if not serves(backend, spec):
        return
    sizes, seeds = st.integers(0, 9), st.integers(0, 99)
    made = [batch(spec, bags=data.draw(sizes), seed=data.draw(seeds)) for _ in range(2)]
    assert_close(backend, spec, made)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_threads_do_not_matter(backend, pooling):
    shape = {"pooling": pooling, "weighted": pooling == "sum"}
    tables = (Table(rows=7, dim=4), Table(rows=900, dim=16))
    spec = Spec(tables=tables, features=(1, 0, 1), weights=torch.float16, **shape)
    if not serves(backend, spec):
        spec = Spec(tables=tables[1:], pooling=pooling)
    spec = serve(backend, spec)
    batches = [batch(spec, bags=257, longest=20, seed=seed) for seed in range(2)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(backend, spec, batches))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for (name, one), (_, two) in zip(found[0].all(), other.all(), strict=True):
            assert torch.equal(one, two), f"{backend}: {name} depends on the number of threads"


def test_stochastic_rounding_is_right_on_average(backend):
    """Updates a hundredth of what a bf16 weight of 1 can show still move the mean, and repeat themselves exactly."""
    rows, part = (250, 10) if INTERPRETED else (2000, 100)
    spec = Spec(
        tables=(Table(rows=rows, dim=16),), weights=torch.bfloat16, optimizer=Optimizer(kind="sgd", lr=2.0**-8 / part)
    )
    spec = serve(backend, spec)
    found = []
    for _ in range(2):
        bags = TableBatchedEmbeddingBag(spec, backend=backend)
        bags.state.tables[0].fill_(1.0)
        for _ in range(20):
            bags(torch.arange(rows), torch.arange(rows + 1)).sum().backward()
        found.append(bags.state.tables[0].float())
    assert torch.equal(*found)
    moved = (1 - found[0].double()).mean().item() / (20 * spec.optimizer.lr)
    assert 0.95 < moved < 1.05


def test_bad_ids_are_named(backend):
    spec = Spec(tables=(Table(rows=5, dim=4), Table(rows=3, dim=4, name="colour")))
    spec = serve(backend, spec)
    bags = TableBatchedEmbeddingBag(spec, backend=backend)
    for wrong in (3, -1, 2**31 + 1):
        with pytest.raises(UserError, match=rf"id {wrong} .*feature 1.* table colour, which has 3 rows"):
            bags(torch.tensor([4, 2, wrong]), torch.tensor([0, 1, 3]))
    with pytest.raises(UserError, match="offsets run from 0 to 4"):
        bags(torch.tensor([4, 2]), torch.tensor([0, 1, 4]))
    with pytest.raises(UserError, match="never fall"):
        bags(torch.tensor([4, 2]), torch.tensor([0, 3, 2]))


def test_what_a_step_allocates_does_not_depend_on_the_rows(backend):
    spec = serve(backend, Spec(tables=(Table(rows=1000, dim=8),)))
    made = batch(spec, bags=8)
    few, few_peak = allocated(backend, 1000, made)
    many, many_peak = allocated(backend, 400_000, made)
    assert few == many  # bytes of every storage that torch made, in order
    assert abs(many_peak - few_peak) < 16_384  # bytes of Python's and NumPy's; a bit a row would be 50,000


def allocated(backend, rows, made):
    """(bytes of each storage that torch makes in a step beside the state, peak of what Python and NumPy make in it)."""
    bags = TableBatchedEmbeddingBag(Spec(tables=(Table(rows=rows, dim=8),)), backend=backend)
    bags(made.ids_N, made.offsets).backward(made.grad)
    own = {bags.state.weights.untyped_storage().data_ptr()}
    own |= {flat.untyped_storage().data_ptr() for flat in bags.state.states.values()}
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in own:
                    sizes.append(leaf.untyped_storage().nbytes())
            return result

    with Watch():  # torch imports much when it is first watched
        bags(made.ids_N, made.offsets).backward(made.grad)
    sizes.clear()
    tracemalloc.start()
    with Watch():
        bags(made.ids_N, made.offsets).backward(made.grad)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return list(sizes), peak


def test_state_can_be_replaced_between_steps(backend):
    """What a checkpoint copies into the views is what the next step reads."""
    spec = Spec(tables=(Table(rows=4, dim=4),), optimizer=Optimizer(lr=0.5, eps=1e-6))
    spec = serve(backend, spec)
    bags = TableBatchedEmbeddingBag(spec, backend=backend)
    bags.state.tables[0].fill_(1.0)
    bags.state.state_views("momentum1")[0].fill_(3.0)
    bags.state.lr = 0.25
    bags(torch.tensor([2]), torch.tensor([0, 1])).backward(torch.ones(1, 4))
    assert torch.allclose(bags.state.state_views("momentum1")[0], torch.tensor([3.0, 3.0, 4.0, 3.0]))
    assert torch.allclose(bags.state.tables[0][2], torch.full((4,), 1 - 0.25 / 2.0))
    assert isinstance(bags.state, State)


def test_an_output_that_is_still_held_stays_as_it_is(backend):
    """Outputs of a MiB and more: memory may be used again, but not while an output, a view or a graph holds it."""
    bags_of_one = 300 if INTERPRETED else 2100  # Triton's kernels use no memory again
    spec = Spec(tables=(Table(rows=50, dim=128),), optimizer=Optimizer(kind="sgd"))
    spec = serve(backend, spec)
    bags = TableBatchedEmbeddingBag(spec, backend=backend)
    fill(bags.state)
    rows = [torch.full((bags_of_one,), row) for row in range(6)]
    held = []
    for row_N in rows:
        out = bags(row_N, torch.arange(bags_of_one + 1))
        held.append((out.detach()[1:] if len(held) % 2 else out * out, bags.state.tables[0][row_N[0]].clone()))
        del out
    for number, (tensor, row_D) in enumerate(held):
        want = row_D if number % 2 else row_D * row_D
        assert torch.equal(tensor, want.expand_as(tensor)), number
    for number in (0, 2, 4):
        held[number][0].sum().backward()
        moved = bags.state.tables[0][number] - held[number][1]
        torch.testing.assert_close(moved, -0.01 * bags_of_one * 2 * held[number][1], rtol=1e-3, atol=1e-4)
