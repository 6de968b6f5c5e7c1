"""docs/config.md lists every key: it is made from the classes that check a config, and the comments beside them."""

import ast
import importlib
import inspect
import os
import tokenize
import typing
from pathlib import Path

import tomli_w
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kernels import registry
from trainer import config as configs

PAGE = Path(__file__).resolve().parents[2] / "docs/config.md"
HEAD = """# Every key of a config

What a key may be, and what it is when the config does not say. A key without a value here has to be given; `none` is a
key that is left out. `configs/` has whole configs, `--set train.epochs=3` sets any of these keys on the command line,
and a run's own `config.toml` has all of them as they were. Made from `trainer/config.py` and the plugins' own files by
`UPDATE_GOLDEN=1 pytest tests/trainer/test_config_page.py`.
"""


def comments(cls: type[BaseModel]) -> dict[str, str]:
    """Field -> the comment that ends its line, or stands in the lines above it."""
    source = Path(inspect.getfile(cls))
    with tokenize.open(source) as file:
        told = {t.start[0]: t for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.COMMENT}
    (body,) = (n.body for n in ast.walk(ast.parse(source.read_text())) if getattr(n, "name", "") == cls.__name__)
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            above = node.lineno - 1
            while above in told and told[above].line.strip().startswith("#"):
                above -= 1
            lines = [*range(above + 1, node.lineno), *range(node.lineno, node.end_lineno + 1)]
            texts = [told[line].string.strip("# ") for line in lines if line in told]
            parts = [part for text in texts for part in text.split("  # ") if not part.startswith("type: ignore")]
            found[node.target.id] = " ".join(parts)
    return found


def value(default: object) -> str:
    if default is PydanticUndefined:
        return ""
    if default is None:
        return "none"
    if isinstance(default, BaseModel):
        return "see below"
    plain = str(default) if isinstance(default, Path) else list(default) if isinstance(default, tuple) else default
    return f"`{tomli_w.dumps({'v': plain}).removeprefix('v = ').strip()}`" if plain != {} else "`{}`"


def allowed(schema: dict) -> str:
    """The values of a key in words, from its JSON schema."""
    if "enum" in schema:
        return ", ".join(f"`{v}`" for v in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(filter(None, (allowed(s) for s in schema["anyOf"])))
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true, false", "object": "a table"}
    if schema.get("type") == "array":
        inner = allowed(schema.get("items", {}))
        return f"list of {inner}" if inner else "list"
    word = names.get(schema.get("type", ""), "a table" if "$ref" in schema else "")
    for key, sign in (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<=")):
        word += f" {sign} {schema[key]}" if key in schema else ""
    return word


def kinds(field: FieldInfo) -> str:
    """The names that a key which chooses a plugin takes: `config._kind_in` has them in its closure."""
    inner = [
        m for part in typing.get_args(field.annotation) for m in getattr(part, "__metadata__", ())
    ]  # of "... | None"
    for check in (m.func for m in (*field.metadata, *inner) if isinstance(m, AfterValidator)):
        package, also = (inspect.getclosurevars(check).nonlocals.get(name) for name in ("package", "also"))
        if package:
            return ", ".join(f"`{name}`" for name in (*also, *registry.names(package)))
    return ""


def table(cls: type[BaseModel], *, skip: tuple[str, ...] = ()) -> str:
    told = comments(cls)
    for base in cls.__mro__[1:]:
        if base.__module__ == cls.__module__ and issubclass(base, BaseModel) and base.model_fields:
            told = comments(base) | told
    schema = cls.model_json_schema()["properties"]
    lines = ["| key | default | may be | |", "|---|---|---|---|"]
    for name, field in cls.model_fields.items():
        if name not in skip:
            cells = (f"`{name}`", value(field.default), kinds(field) or allowed(schema[name]), told.get(name, ""))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def page() -> str:
    parts = [HEAD, "\n## Above all sections\n\n" + table(configs.Config, skip=SECTIONS)]
    for title, cls in TITLES.items():
        about = inspect.getdoc(cls) if "__doc__" in vars(cls) and cls.__doc__ else ""
        parts.append(f"\n## {title}\n\n" + (f"{about}\n\n" if about else "") + table(cls))
    for title, package in (("[model]", "trainer.models"), ("optim.sparse and optim.dense", "trainer.optim")):
        parts.append(f"\n## {title}\n\n`kind` chooses; the other keys are those of the kind.\n")
        for kind in registry.names(package):
            cls = importlib.import_module(f"{package}.{kind}").Config
            about = inspect.cleandoc(cls.__doc__) if cls.__doc__ and cls.__doc__ != configs.Plugin.__doc__ else ""
            own = "".join(f"{line}  \n" for line in about.splitlines())
            parts.append(f'\n### kind = "{kind}"\n\n' + (f"{own}\n" if own else "") + table(cls, skip=("kind",)))
    return "".join(parts)


TITLES = {
    "[data]": configs.Data,
    "[data.features]": configs.Features,
    "[tables]": configs.Tables,
    "[[tables.override]]": configs.TableOverride,
    "[optim]": configs.Optim,
    "[optim.schedule]": configs.Schedule,
    "[train]": configs.Train,
    "[checkpoint]": configs.Checkpoint,
    "[kernels]": configs.Kernels,
    "[eval]": configs.Eval,
    "[plan]": configs.Plan,
    "[[plan.constraints]]": configs.PlanConstraint,
    "[run]": configs.Run,
}
SECTIONS = tuple(name for name in configs.Config.model_fields if name not in ("name", "seed"))


def test_the_page_is_that_of_the_classes():
    """UPDATE_GOLDEN=1 writes it again."""
    text = page()
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(text)
    assert text == PAGE.read_text()
