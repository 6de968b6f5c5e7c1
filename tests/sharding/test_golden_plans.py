"""Plans of shipped configs on known clusters, as they were: a change of costs or search shows in review."""

import os
from pathlib import Path

import pytest

from sharding.planner import solve
from sharding.topology import parse
from trainer import config as configs
from trainer import planning
from trainer.data.dataset import Dataset
from trainer.words import runs

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/plans"
CASES = [
    ("quickstart", "cpu:1x2"),
    ("quickstart", "h100-80gb:2x4"),
    ("criteo_1tb_dlrm", "a100-40gb:1x8"),
    ("criteo_1tb_dlrm", "l4:4x8"),
    ("mlperf_dlrm_dcnv2", "h100-80gb:2x8"),
]


@pytest.mark.parametrize(("name", "on"), CASES, ids=lambda x: x.replace(":", "-"))
def test_plans_are_as_before(name, on):
    """UPDATE_GOLDEN=1 pytest tests/sharding/test_golden_plans.py writes these files again."""
    cluster = parse(on)
    # "auto" on a CPU is what the CPU of the test can do; these files hold for one that multiplies bf16.
    pinned = ['train.precision="bf16"'] if cluster.device == "cpu" else []
    config = configs.load(ROOT / f"configs/{name}.toml", pinned)
    dataset = Dataset.model_validate_json((ROOT / f"configs/figures/{name}.json").read_text())
    work = planning.work_of_config(config, dataset, planning.on_meta(config, dataset), device=cluster.device)
    found = solve(work, cluster, limits=planning.limits_of(config, cluster))
    lines = [f"{name} on {on}", f"step {1e3 * found.load.step_seconds:.4g} ms, bound {1e3 * found.bound:.4g} ms", ""]
    for table, choice in zip(work.tables, found.choices, strict=True):
        label = found.prices.kinds[choice.kind].kind.label
        lines.append(f"{table.name:4} {table.rows:>10,} x {table.dim:<4} {label:24} ranks {runs(sorted(choice.ranks))}")
    path, text = GOLDEN / f"{name}_{on.replace(':', '_')}.txt", "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
