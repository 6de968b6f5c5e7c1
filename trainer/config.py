"""The config of a run: TOML -> frozen pydantic models.

`load(path, overrides)` is the only way in: it reads the file, applies `--set a.b=c`, refuses unknown keys with the
nearest name, and turns every complaint into one UserError that names file and key. A plugin's own options stand next to
what they build (`trainer/models/dlrm.py: Config`) and are validated here through their `kind`.
"""

import hashlib
import math
import os
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from kernels import registry
from kernels.errors import UserError
from sharding.tables.base import ROW_TYPES, SHARDING_TYPES
from sharding.topology import quantity
from trainer.data.dataset import Frozen

Positive = Annotated[int, Field(gt=0)]
ShardingType = Literal["auto", *SHARDING_TYPES]  # type: ignore[valid-type]
RowType = Literal[*ROW_TYPES]  # type: ignore[valid-type]


PLUGINS = ("trainer.models", "trainer.optim")  # folders whose kinds have options of their own


class Plugin(Frozen):
    """Base of a plugin's options; `kind` is the file name in its folder, or a dotted name."""

    kind: str


def _plugin(package: str):
    """A field whose options are checked by the `Config` class of the plugin its `kind` names."""

    def build(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        if not isinstance(value, dict) or "kind" not in value:
            raise ValueError(f"needs kind = one of {', '.join(registry.names(package))}")
        return registry.load(package, str(value["kind"])).Config.model_validate(value)

    return Annotated[SerializeAsAny[Plugin], BeforeValidator(build)]


def _kind_in(package: str, *also: str):
    """The name of a plugin that has no options of its own; a dotted name is looked for when it is needed."""

    def check(value: str) -> str:
        known = [*also, *registry.names(package)]
        if "." not in value and value not in known:
            raise ValueError(
                f"{value!r} is not a kind found in {package.replace('.', '/')}/; {registry.nearest(value, known)}"
            )
        return value

    return Annotated[str, AfterValidator(check)]


TableKind = _kind_in("sharding.tables")


class Features(Frozen):
    """Which columns of a Parquet folder that nobody prepared are what."""

    labels: tuple[str, ...] = Field(min_length=1)  # columns of 0 and 1, or between
    dense: tuple[str, ...] = ()  # columns of numbers
    categorical: dict[str, Positive]  # column -> cardinality; a list column is multi-hot
    weight: str | None = None  # a column of numbers >= 0; default: 1 for every row


class Data(Frozen):
    path: Path  # dataset folder, or a folder of Parquet files together with `features`
    features: Features | None = None  # of Parquet files that nobody prepared
    prepare: str | None = None  # what `train` prepares into `path` when it is missing, e.g. "synthetic:criteo"
    prepare_options: dict[str, Any] = {}  # rows, seed, scale, ... of that source
    streams: Positive = 8  # S: a multiple of every world size the run may ever use
    shuffle_window: Positive = 32768  # rows of one stream shuffled among themselves; 1 = file order
    prefetch: Positive = 4  # batches decoded ahead
    threads: Positive = 2  # decoding threads of a rank
    id_policy: Literal["error", "clip", "hash"] = "error"  # for ids outside a table; overridden per table


class TableOptions(Frozen):
    """What may be said of a table; None leaves the default."""

    rows: Positive | None = None  # default: the feature's cardinality
    dim: Positive | None = None
    pooling: Literal["sum", "mean"] | None = None
    sharding: ShardingType | None = None
    kind: TableKind | None = None  # type: ignore[valid-type]
    options: dict[str, Any] | None = None  # of the kind (docs/tables.md)
    id_policy: Literal["error", "clip", "hash"] | None = None
    init_std: float | None = None  # of normal initial weights; default: uniform up to +- sqrt(1 / rows)
    row_type: RowType | None = None  # type: ignore[valid-type]


class TableOverride(TableOptions):
    """What some tables are that the others are not; a key that is left out is that of [tables]."""

    match: str | tuple[str, ...]  # feature names or shell patterns
    table: str | None = None  # the matched features share one table of this name


class Tables(Frozen):
    dim: Positive = 16  # columns of a row
    pooling: Literal["sum", "mean"] = "sum"  # of the rows of a bag
    sharding: ShardingType = "auto"  # "auto" leaves it to the planner (docs/planner.md)
    kind: TableKind = "standard"  # type: ignore[valid-type]  # what a table stores (docs/tables.md)
    row_type: RowType = "fp32"  # type: ignore[valid-type]  # how a row is stored (docs/tables.md)
    override: tuple[TableOverride, ...] = ()  # the last match wins, key by key


class Schedule(Frozen):
    """A factor on both learning rates: linear warm-up, then constant, then decay."""

    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["none", "linear", "cosine", "poly"] = "none"
    decay_start: int = Field(default=0, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    power: float = 2.0  # of decay = "poly"
    end_factor: float = Field(default=0.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        if self.decay != "none" and self.decay_steps <= 0:
            raise ValueError(f"decay = {self.decay!r} needs decay_steps > 0")
        if self.decay != "none" and self.decay_start < self.warmup_steps:
            raise ValueError(f"decay_start {self.decay_start} lies inside the warm-up of {self.warmup_steps} steps")
        return self

    def factor(self, step: int) -> float:
        """The factor for the step of this number (from 0)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "none" or step < self.decay_start:
            return 1.0
        left = 1.0 - min(1.0, (step - self.decay_start) / self.decay_steps)
        if self.decay == "cosine":
            left = 0.5 * (1.0 - math.cos(math.pi * left))
        elif self.decay == "poly":
            left = left**self.power
        return self.end_factor + (1.0 - self.end_factor) * left


class Optim(Frozen):
    sparse: _plugin("trainer.optim")  # type: ignore[valid-type]  # the tables, fused into the backward
    dense: _plugin("trainer.optim")  # type: ignore[valid-type]  # everything else
    schedule: Schedule = Schedule()
    clip_grad_norm: float | None = Field(default=None, gt=0)  # of the dense gradients


class Train(Frozen):
    batch_size: Positive  # global
    epochs: Positive = 1
    max_steps: Positive | None = None  # instead of epochs
    nproc: Positive = 1  # ranks, unless --nproc says otherwise
    pipeline: Literal["overlapped", "plain"] = "overlapped"  # the next batch's ids travel beside the step
    precision: Literal["auto", "fp32", "bf16"] = "fp32"  # of the dense layers; "auto": bf16 where the CPU has it
    loss: Literal["bce", "mse"] = "bce"
    task_weights: tuple[float, ...] | None = None  # one per label; default 1 each
    log_every: Positive = 20  # steps


class Checkpoint(Frozen):
    """When a run saves itself, besides at its end and when it is stopped by a signal."""

    every_steps: Positive | None = None
    every_minutes: float | None = Field(default=None, gt=0)  # both may be set
    # 0: every one is full; n: rows touched since the last, n before they are merged
    deltas: int = Field(default=0, ge=0)
    keep: Positive = 2  # the newest ones that stay
    keep_every: Positive | None = None  # and those whose step is a multiple of this
    count_updates: bool = False  # in how many steps each row was updated: 4 bytes a row, for `ckpt inspect`
    background: bool = True  # the step stops for a copy into host memory only, which takes as much as the state
    dir: str | None = None  # a folder or a fsspec URL for DIR/NAME/step_N; default RUN/checkpoints
    init_from: str | None = None  # a run or checkpoint whose weights a new run begins with, by table and parameter name
    init_rows: Literal["same", "grow", "cut", "any"] = "same"  # what may happen there to a table of other rows


class Kernels(Frozen):
    # A file in kernels/backends/, or "auto" for the fastest that can serve; "fbgemm" is TorchRec's own kernel.
    embedding_bag: _kind_in("kernels.backends", "auto") = "auto"  # type: ignore[valid-type]
    interaction: _kind_in("kernels.interactions", "auto") = "auto"  # type: ignore[valid-type]  # the dots of a DLRM
    id_map: _kind_in("kernels.id_maps", "auto") = "auto"  # type: ignore[valid-type]  # of collisionless tables


class Eval(Frozen):
    every: Positive | None = None  # steps; default: only at the end
    split: str | None = None  # during training; default valid, or test where there is no valid
    final_split: str | None = None  # at the end; default test, or valid where there is no test
    batch_size: Positive | None = None  # global; default that of training
    max_rows: Positive | None = None  # of the evaluations during training; the last one takes all rows


class PlanConstraint(Frozen):
    """What some tables may become; where several match a table, all of them hold."""

    match: str | tuple[str, ...]  # names of physical tables, or shell patterns
    sharding: tuple[Literal[SHARDING_TYPES], ...] | None = None  # type: ignore[valid-type]
    tier: tuple[Literal["device", "cache", "host"], ...] | None = None

    @field_validator("sharding", "tier", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Plan(Frozen):
    """How the tables are spread over the ranks: docs/planner.md."""

    hbm: str | None = None  # memory of each rank's device to use, such as "60GiB"; default: nearly all of it
    host_mem: str | None = None  # memory of each host to use for tables outside the devices
    profiles: Path | None = None  # TOML with [profiles.NAME] of clusters
    file: Path | None = None  # a plan.json to take as it is
    constraints: tuple[PlanConstraint, ...] = ()  # all that match a table hold

    @field_validator("hbm", "host_mem")
    @classmethod
    def _bytes(cls, value: str | None) -> str | None:
        if value is not None:
            quantity(value, "bytes", where="memory")
        return value


class Run(Frozen):
    dir: Path = Path("runs")  # of the run folders
    tensorboard: bool = False  # write RUN/tensorboard too
    timeout_seconds: Positive = 300  # a collective, or the first calls of anything, that take longer end the run
    hang_seconds: int = Field(default=60, ge=0)  # the same for a rank that makes no progress later on; 0: never
    max_restarts: int = Field(default=0, ge=0)  # of all ranks from the newest valid checkpoint, after a failure
    grace_seconds: Positive = 60  # from a signal to stop until the ranks are killed: to save in


class Config(Frozen):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # of the run folder
    seed: int = Field(default=1, ge=0, lt=2**31)  # of the initial weights, the order of the rows, and dropout
    data: Data
    tables: Tables = Tables()
    model: _plugin("trainer.models")  # type: ignore[valid-type]
    optim: Optim
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    kernels: Kernels = Kernels()
    eval: Eval = Eval()
    plan: Plan = Plan()
    run: Run = Run()

    @field_validator("name")
    @classmethod
    def _no_reserved(cls, value: str) -> str:
        if value == "latest":
            raise ValueError("'latest' is the link to the newest run; choose another name")
        return value

    @model_validator(mode="after")
    def _check(self) -> "Config":
        streams = self.data.streams
        for key, size in (("train.batch_size", self.train.batch_size), ("eval.batch_size", self.eval.batch_size)):
            if size is not None and size % streams:
                lower, upper = size // streams * streams, (size // streams + 1) * streams
                raise ValueError(
                    f"{key} = {size} does not divide over data.streams = {streams}; use {lower or upper} or {upper}"
                )
        return self

    def check_world_size(self, world_size: int) -> None:
        """UserError unless the streams divide over this many ranks."""
        if self.data.streams % world_size:
            fits = [w for w in range(1, self.data.streams + 1) if self.data.streams % w == 0]
            raise UserError(
                f"{world_size} ranks do not divide data.streams = {self.data.streams}; "
                f"use {', '.join(map(str, fits))} ranks, or set data.streams to a multiple of {world_size}"
            )

    def located(self) -> "Config":
        """The same with absolute paths: what a run keeps, since it may be evaluated from another folder."""
        data = self.data.model_copy(update={"path": Path(os.path.abspath(self.data.path))})
        paths = {name: getattr(self.plan, name) for name in ("file", "profiles")}
        found = {name: Path(os.path.abspath(path)) for name, path in paths.items() if path is not None}
        return self.model_copy(update={"data": data, "plan": self.plan.model_copy(update=found)})

    def to_toml(self) -> str:
        """The resolved config: loading this text gives the same config."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))

    def sha256(self) -> str:
        return hashlib.sha256(self.to_toml().encode()).hexdigest()


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Read a TOML config and apply `a.b=c` overrides (c is a TOML value, or a bare string)."""
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _apply(values, override)
    return validate(Config, values, where=str(path))


def validate(model: type[BaseModel], values: dict[str, Any], *, where: str) -> Any:
    """`model(**values)`, with every complaint in one UserError: file, key, what is wrong, the nearest name."""
    try:
        return model.model_validate(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except ValidationError as error:
        lines = [_complaint(model, values, e) for e in error.errors(include_url=False)]
        raise UserError("\n".join(f"{where}: {line}" for line in lines)) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise UserError(f"--set {override!r}: write it as --set section.key=value")
    try:
        value = tomllib.loads(f"v = {text.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    at = values
    for i, part in enumerate(parts[:-1]):
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise UserError(f"--set {override!r}: {'.'.join(parts[: i + 1])} is not a section")
    at[parts[-1]] = value


def _complaint(model: type[BaseModel], values: dict[str, Any], error: Any) -> str:
    loc = list(error["loc"])
    key = ".".join(str(part) for part in loc)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; {registry.nearest(str(loc[-1]), _fields_at(model, values, loc[:-1]))}"
    if error["type"] == "missing":
        return f"{key}: missing{_missing(model, loc)}"
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    shown = "" if isinstance(given, (dict, list, tuple)) or error["type"] == "value_error" else f" (it is {given!r})"
    return (f"{key}: " if key else "") + message + shown


def _missing(model: type[BaseModel], loc: list[Any]) -> str:
    """What a key that is missing has to be: the kinds to choose from, and where all keys are listed."""
    fields: dict[str, Any] = model.model_fields
    for part in loc[:-1]:
        inner = _model_in(fields[part].annotation) if part in fields else None
        fields = inner.model_fields if inner else {}
    package = next((p for p in PLUGINS if loc[-1] in fields and _is_plugin(fields[loc[-1]], p)), None)
    kinds = f"; needs kind = one of {', '.join(registry.names(package))}" if package else ""
    return kinds + (" (docs/config.md has every key)" if model is Config else "")


def _fields_at(model: type[BaseModel], values: Any, loc: list[Any]) -> list[str]:
    """The field names of the model that `loc` leads to: nested models, lists of models and plugins alike."""
    current: Any = model
    for part in loc:
        values = values[part] if isinstance(values, (dict, list)) and values else {}
        if isinstance(part, int):
            continue
        field = current.model_fields[part]
        package = next((p for p in PLUGINS if _is_plugin(field, p)), None)
        if package and isinstance(values, dict) and "kind" in values:
            current = registry.load(package, values["kind"]).Config
        else:
            current = _model_in(field.annotation)
    return sorted(current.model_fields)


def _is_plugin(field: Any, package: str) -> bool:
    found = [m.func for m in field.metadata if isinstance(m, BeforeValidator)]
    return any(getattr(f, "__closure__", None) and f.__closure__[0].cell_contents == package for f in found)


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        if inner is not types.NoneType and (found := _model_in(inner)) is not None:
            return found
    return None


def _without_none(value: Any) -> Any:
    """TOML has no null: keys that are None are left out, which loads as the default None."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value
