import logging
import subprocess
import sys
import warnings

import pytest

from trainer import quiet

KNOWN = [
    "WARNING:torchrec.distributed.planner.types:The topology was constructed directly rather than via TopologyFactory.",
    "x/planner_helpers.py:489: FutureWarning: Please use DTensor instead and we are deprecating ShardedTensor.",
    "[rank0]:W1123 18:03:01.049 9201 torch/fx/_symbolic_trace.py:56] is_fx_tracing will return true for both "
    "fx.symbolic_trace and torch.export. Please use is_fx_tracing_symbolic_tracing()",
    "Setting OMP_NUM_THREADS environment variable for each process to be 1 in default, to avoid your system",
    "*****************************************",
    "[W1123 18:03:01 socket.cpp:767] [c10d] The IPv6 network addresses of (box, 29500) cannot be retrieved (gai error)",
    "[W1123 18:03:01 ProcessGroupGloo.cpp:727] Warning: Unable to resolve hostname to a (local) address. Using the "
    "loopback address as fallback.",
    "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1",
]
REAL = [
    "RuntimeWarning: invalid value encountered in divide",
    "FutureWarning: something else is deprecated",
    "WARNING:torchrec.distributed.planner.types:another message",
    "[rank0]:[W1123 socket.cpp:100] [c10d] The client socket has failed to connect to (box, 29500)",
    "torch.OutOfMemoryError: CUDA out of memory",
    "CUDA error: device-side assert triggered",
]


@pytest.mark.parametrize("line", KNOWN)
def test_known_noise(line):
    assert quiet.is_noise(line)


@pytest.mark.parametrize("line", REAL)
def test_real_trouble(line):
    assert not quiet.is_noise(line)


def test_install_filters_warnings_and_records(caplog):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet.install()
        warnings.warn("Please use DTensor instead and we are deprecating ShardedTensor.", FutureWarning, stacklevel=1)
        warnings.warn("Please mind the gap", FutureWarning, stacklevel=1)
    assert [str(w.message) for w in seen] == ["Please mind the gap"]
    logger = logging.getLogger("torchrec.distributed.planner.types")
    with caplog.at_level(logging.WARNING):
        logger.warning("The topology was constructed directly rather than via TopologyFactory.create_topology()")
        logger.warning("real")
    assert [r.getMessage() for r in caplog.records] == ["real"]


def test_installing_twice_adds_nothing():
    quiet.install()
    logger = logging.getLogger("torch.fx._symbolic_trace")
    filters = list(logger.filters)
    quiet.install()
    assert logger.filters == filters


def test_it_needs_no_library():
    code = "import sys; from trainer import quiet; quiet.install(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
