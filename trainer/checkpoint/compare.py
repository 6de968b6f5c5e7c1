"""Which differences between two configs a run may go on with.  (Without torch: the command line asks too.)"""

from typing import Any

from trainer.config import Config

# Sections and keys of the config that a run may change between two of its parts; all others decide what the state means
# or which samples come next.
FREE = (
    *("name", "run", "eval", "kernels", "checkpoint", "data.path", "data.prepare", "data.prepare_options"),
    *("data.prefetch", "data.threads", "train.epochs", "train.max_steps", "train.nproc", "train.pipeline"),
    *("train.precision", "train.log_every", "optim.schedule", "optim.clip_grad_norm", "optim.sparse.lr"),
    *("optim.sparse.eps", "optim.sparse.l2", "optim.sparse.beta1", "optim.sparse.beta2", "optim.dense.lr"),
    *("optim.dense.eps", "optim.dense.l2", "optim.dense.beta1", "optim.dense.beta2", "tables.sharding"),
    *("train.task_weights", "model.dropout"),
)


def differences(saved: Config, now: Config) -> tuple[list[str], list[str]]:
    """("key: old -> new" of what must not differ, and of what may)."""
    old, new = _flat(saved.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    fatal, reported = [], []
    for key in sorted(set(old) | set(new)):
        if old.get(key) == new.get(key):
            continue
        text = f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        free = any(key == name or key.startswith(name + ".") for name in FREE) or key.endswith(".sharding")
        (reported if free else fatal).append(text)
    return fatal, reported


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        return {k: v for name, value in values.items() for k, v in _flat(value, f"{prefix}{name}.").items()}
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        return {k: v for i, value in enumerate(values) for k, v in _flat(value, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): values}
