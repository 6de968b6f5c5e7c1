"""Settings of every test: one thread a process, quiet libraries, hypothesis without a clock, a seed or a database."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the workers share the cores

import tempfile

os.environ["TABLEMESH_CACHE"] = tempfile.gettempdir() + "/tablemesh-tests-have-no-calibration"  # never made

from hypothesis import HealthCheck, settings

from trainer import quiet

quiet.install()
settings.register_profile(
    "tablemesh",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tablemesh")
