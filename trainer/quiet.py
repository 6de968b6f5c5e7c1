"""What the libraries say that a user can do nothing about, and how it is kept off the screen.

`install()` belongs at the very start of a process, before torch is imported. The command line filters the ranks'
stderr once more with `is_noise`, for what C++ prints and what is printed before `install()`. Everything else goes
through: a pattern names one message, never a category or a module.
"""

import logging
import re
import warnings

# Python warnings, each matched from the start of its message, with where it comes from.
WARNINGS = (
    r"Please use DTensor instead and we are deprecating ShardedTensor",  # torch DCP on TorchRec's state dict
    r"HeuristicalStorageReservation is known to cause issues",  # TorchRec's planner and its own default
    r"`broadcast_buffers` is deprecated",  # TorchRec calling DistributedDataParallel
    r"torch\.distributed\.reduce_op is deprecated",  # torchrec, torchmetrics
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",  # row-wise tables
    r"`torch\.distributed\._(all_gather|reduce_scatter)_base` is a private function",  # TorchRec's collectives
    r"`?torch\.utils\._pytree\._register_pytree_node`? is deprecated",  # TorchRec's KeyedJaggedTensor
    # FBGEMM's dense lookup, behind data-parallel tables; its gradient equals torch's EmbeddingBag's to 5e-7
    r"fbgemm::dense_embedding_codegen_lookup_function: an autograd kernel was not registered",
    r"The pynvml package is deprecated",  # torch.cuda
    r"pkg_resources is deprecated as an API",  # torchmetrics, lightning_utilities
    r"Deprecated call to `pkg_resources\.declare_namespace",
    r"You are using `torch\.load` with `weights_only=False`",  # torch DCP's own metadata
    r"TypedStorage is deprecated",  # torch DCP
    r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to (save|load) in a single",
)

# Log records: the logger that says it and the start of the message.
RECORDS = (
    ("torchrec.distributed.planner.types", r"The topology was constructed directly rather than via TopologyFactory"),
    ("torchrec.distributed.planner.storage_reservations", r"There is a known issue with TorchRec's dense tensor size"),
    ("torchrec.distributed.comm", r"TORCHREC_RESOLVED_POD_SIZE not set"),
    ("torchrec.distributed.comm", r"\[Connection\] (intra|cross)_group: "),  # an announcement at the level of a warning
    ("torchrec.distributed.utils", r"Sharding Type is data_parallel, caching params will be ignored"),
    # On the CPU there are no streams to race on; with a GPU the pipeline gives the module one.
    ("torchrec.distributed.train_pipeline.postproc", r"Postproc module \S+ has no dist stream"),
    ("root", r"Sharding spec not found for "),  # data-parallel tables have none
    ("torch.fx._symbolic_trace", r"is_fx_tracing will return true for both fx\.symbolic_trace and torch\.export"),
    ("torch.distributed.elastic.multiprocessing.redirects", r"NOTE: Redirects are currently not supported"),
)

# Lines of stderr that no Python filter sees.
LINES = (
    r"Setting OMP_NUM_THREADS environment variable for each process to be",  # torchrun's banner and its frame
    r"^\*{20,}$",
    r"\[c10d\] The IPv[46] network addresses of .* cannot be retrieved",  # no reverse DNS: a laptop, a container
    r"\[c10d\] The hostname of the client socket cannot be retrieved",
    r"Unable to resolve hostname to a \(local\) address\. Using the loopback address",
    r"\[Gloo\] Rank \d+ is connected to \d+ peer ranks",
    r"WARNING: destroy_process_group\(\) (has|was) not (been )?called",
    r"All log messages before absl::InitializeLog\(\) is called",
)

_RECORDS = tuple((name, re.compile(p)) for name, p in RECORDS)
_LINES = re.compile("|".join(f"(?:{p})" for p in (*WARNINGS, *LINES, *(p for _, p in RECORDS))))


def install() -> None:
    """Filter Python warnings and log records of this process. Calling it again changes nothing."""
    for pattern in WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for name, pattern in _RECORDS:
        logger = logging.getLogger(name)
        if not any(isinstance(f, _Known) and f.pattern is pattern for f in logger.filters):
            logger.addFilter(_Known(pattern))


def is_noise(line: str) -> bool:
    """True for a line of stderr that holds one of the known messages."""
    return _LINES.search(line) is not None


class _Known(logging.Filter):
    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        return self.pattern.match(record.getMessage()) is None
