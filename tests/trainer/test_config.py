import os
import tomllib
from pathlib import Path

import pytest

from kernels.errors import UserError
from trainer import config as configs

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "configs"
SHIPPED = sorted(p for p in (ROOT / "configs").glob("*.toml") if not p.name.endswith(".spec.toml"))

SMALL = """
name = "small"
[data]
path = "data/small"
[model]
kind = "dlrm"
bottom = [8, 4]
top = [8, 1]
[optim]
sparse = { kind = "sgd", lr = 0.1 }
dense = { kind = "adam", lr = 0.01 }
[train]
batch_size = 64
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_resolve_as_before(path):
    """A changed default shows in review: UPDATE_GOLDEN=1 writes these files again."""
    text = configs.load(path).to_toml()
    golden = GOLDEN / path.name
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_are_short(path):
    assert len(path.read_text().splitlines()) < 60


def test_resolved_config_loads_as_itself(small, tmp_path):
    first = configs.load(small, ["train.max_steps=7", "optim.clip_grad_norm=1.5"])
    again = tmp_path / "again.toml"
    again.write_text(first.to_toml())
    second = configs.load(again)
    assert second == first
    assert second.sha256() == first.sha256()


def test_overrides(small):
    config = configs.load(
        small,
        [
            "train.batch_size=128",
            'name="other"',
            "data.path=somewhere/else",
            "tables.dim=32",
            "model.top=[16, 1]",
            "run.tensorboard=true",
        ],
    )
    assert config.train.batch_size == 128
    assert config.name == "other"
    assert config.data.path == Path("somewhere/else")
    assert config.tables.dim == 32
    assert list(config.model.top) == [16, 1]
    assert config.run.tensorboard is True


def test_config_is_frozen(small):
    config = configs.load(small)
    with pytest.raises(ValueError, match="frozen"):
        config.train.batch_size = 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batchsize=64", ["train.batchsize", "unknown key", "batch_size"]),
        ("data.shufle_window=1", ["data.shufle_window", "unknown key", "shuffle_window"]),
        ("model.botom=[1]", ["model.botom", "unknown key", "bottom"]),
        ("optim.sparse.learning=1", ["optim.sparse.learning", "unknown key"]),
        ("trian.batch_size=1", ["trian", "unknown key", "train"]),
        ('model.kind="dlmr"', ["model", "'dlmr'", "dlrm"]),
        ('optim.dense.kind="adma"', ["optim.dense", "'adma'", "adam"]),
        ('model.kind="no.such.module"', ["no.such.module", "PYTHONPATH"]),
        ("train.batch_size=60", ["train.batch_size = 60", "data.streams = 8", "56", "64"]),
        ("eval.batch_size=4", ["eval.batch_size = 4", "data.streams = 8", "8"]),
        ("train.batch_size=0", ["train.batch_size", "greater than 0", "0"]),
        ('train.batch_size="many"', ["train.batch_size", "integer", "many"]),
        ('tables.sharding="rowwise"', ["tables.sharding", "row_wise"]),
        ('tables.kind="standart"', ["tables.kind", "'standart'", "sharding/tables/", "'standard'"]),
        ('tables.override=[{match="*", kind="x"}]', ["tables.override.0.kind", "'x'"]),
        ('kernels.embedding_bag="fbgem"', ["kernels.embedding_bag", "kernels/backends/", "'fbgemm'"]),
        ('name="a/b"', ["name", "a/b"]),
        ('name="latest"', ["name", "latest"]),
        ('optim.schedule={decay="linear"}', ["optim.schedule", "decay_steps"]),
        ('optim.schedule={decay="linear", decay_steps=5, warmup_steps=10}', ["optim.schedule", "warm-up"]),
    ],
)
def test_complaints_name_file_and_key(small, override, words):
    with pytest.raises(UserError) as caught:
        configs.load(small, [override])
    message = str(caught.value)
    for word in [str(small), *words]:
        assert word in message, message


def test_all_complaints_at_once(small):
    with pytest.raises(UserError) as caught:
        configs.load(small, ["train.epoch=1", "data.stream=1", "train.batch_size=-1"])
    assert len(str(caught.value).splitlines()) == 3


def test_missing_section(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('name = "x"\n')
    with pytest.raises(UserError) as caught:
        configs.load(path)
    said = str(caught.value)
    for key in ("data: missing", "model: missing; needs kind = one of dcn, dlrm", "optim: missing", "train: missing"):
        assert key in said
    path.write_text(SMALL.replace("dense = {", "unused = {"))
    with pytest.raises(UserError, match=r"optim\.dense: missing; needs kind = one of adagrad, .*docs/config\.md"):
        configs.load(path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_size", ["--set", "section.key=value"]),
        ("=3", ["--set", "section.key=value"]),
        ("name.first=3", ["'name.first=3'", "name is not a section"]),
    ],
)
def test_bad_overrides(small, override, words):
    with pytest.raises(UserError) as caught:
        configs.load(small, [override])
    for word in words:
        assert word in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        configs.load(tmp_path / "none.toml")
    with pytest.raises(UserError, match="directory"):
        configs.load(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("name = \n")
    with pytest.raises(UserError, match=r"not valid TOML.*line 1"):
        configs.load(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        configs.load(broken)


def test_world_size_must_divide_streams(small):
    config = configs.load(small)
    for good in (1, 2, 4, 8):
        config.check_world_size(good)
    with pytest.raises(UserError, match=r"3 ranks do not divide data.streams = 8; use 1, 2, 4, 8 ranks"):
        config.check_world_size(3)


def test_schedule():
    make = configs.Schedule
    assert [make(warmup_steps=4).factor(s) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    linear = make(decay="linear", decay_start=2, decay_steps=4, end_factor=0.2)
    assert [round(linear.factor(s), 6) for s in (0, 2, 4, 6, 100)] == [1.0, 1.0, 0.6, 0.2, 0.2]
    poly = make(decay="poly", decay_start=0, decay_steps=10, power=2.0)
    assert poly.factor(5) == pytest.approx(0.25)
    cosine = make(decay="cosine", decay_start=0, decay_steps=10)
    assert cosine.factor(0) == 1.0
    assert cosine.factor(5) == pytest.approx(0.5)
    assert cosine.factor(10) == pytest.approx(0.0)


def test_plugin_of_the_users_own(small, tmp_path, monkeypatch):
    (tmp_path / "their_models.py").write_text(
        "from trainer.config import Plugin\nclass Config(Plugin):\n    depth: int = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = tomllib.loads(SMALL) | {"model": {"kind": "their_models.py".removesuffix(".py")}}
    with pytest.raises(UserError, match="is not a kind"):
        configs.validate(configs.Config, text, where="here")
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "their_models.py").rename(package / "deep.py")
    config = configs.validate(configs.Config, text | {"model": {"kind": "theirs.deep", "depth": 5}}, where="here")
    assert config.model.depth == 5
