"""A configuration from a YAML file and `section.key=value` overrides, with all that is wrong told at once; and back."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from parallel.layout import Problem, Shapes, layout_problems
from pretrain.config import yaml
from pretrain.config.duration import Span
from pretrain.config.run import Config
from pretrain.config.section import Inconsistent
from pretrain.errors import UserError

# What may differ when a run is resumed. Nothing here decides the numbers of a step: the data is known by its hashes,
# wherever it lies. schedule.total may only grow.
FREE = (
    "parallel",
    "kernels",
    "monitor",
    "checkpoint",
    "batch.micro_size",
    "run.dir",
    "run.stop_at",
    "run.on_spike",
    "run.spike_factor",
    "run.max_rewinds",
    "data.train",
    "data.validation",
    "data.prefetch",
    "data.cache",
    "data.remote",
    "data.phases.micro_size",
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with overrides. Raises UserError with every problem, each with its path and mend."""
    values = _read(Path(path))
    problems = [problem for override in overrides for problem in _apply(values, override)]
    return checked_config(values, f"{path}: this configuration cannot be used", problems)


def checked_config(values: dict[str, Any], title: str, problems: Sequence[Problem] = ()) -> Config:
    """The config of these values by section. Raises UserError, under the title, with what is wrong beside `problems`."""
    found = list(problems)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        found += _translate(error)
    if found:
        raise problem_error(title, found)
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML; `load_config` gives the same config back."""
    return yaml.dump(config.model_dump(mode="json"))


def problem_error(title: str, problems: Iterable[Problem]) -> UserError:
    """One error of many problems."""
    lines = [
        f"  {problem.path}: {problem.message}" + (f"; {problem.mend}" if problem.mend else "") for problem in problems
    ]
    return UserError("\n".join([f"{title}:", *lines]))


def check_layout(config: Config, world: int) -> None:
    """Raises UserError with everything that keeps the run from `world` processes."""
    problems = fitting_problems(config, world)
    if problems:
        raise problem_error("the layout does not fit this run", problems)


def fitting_problems(config: Config, world: int) -> list[Problem]:
    """Everything that keeps the run, in any of its phases, from `world` processes under its layout."""
    *earlier, last = (layout_problems(config.parallel, shapes_of(phase), world) for phase in config.phases)
    named = [
        problem._replace(path=f"data.phases.{number}: {problem.path}")
        for number, problems in enumerate(earlier)
        for problem in problems
        if problem not in last
    ]
    return last + named


def shapes_of(config: Config) -> Shapes:
    """The numbers of a run, or of one of its phases, that its layout has to divide."""
    model, batch = config.model, config.batch
    ramp = range(batch.ramp.start, batch.size, batch.ramp.increment) if batch.ramp else ()
    return Shapes(
        model.total_layers,
        model.num_heads,
        model.kv_heads,
        model.feed_forward_size,
        tuple(config.lengths),
        (batch.size, *ramp),
        batch.micro_size,
    )


def resume_problems(saved: Config, wished: Config) -> list[Problem]:
    """What a resume would change that it may not."""
    old, new = saved.model_dump(mode="json"), wished.model_dump(mode="json")
    return [
        Problem(path, f"this run was started with {was!r}, now it is {now!r}", mend)
        for path, was, now in _differences(old, new)
        if (mend := _refusal(path, saved, wished))
    ]


def _refusal(path: str, saved: Config, wished: Config) -> str:
    """How to mend a difference at `path`; empty if it is allowed."""
    plain = re.sub(r"\.\d+\b", "", path)  # without the places in lists
    if any(plain == free or plain.startswith(f"{free}.") for free in FREE):
        return ""
    if path == "schedule.total":
        before, after = saved.schedule.total, wished.schedule.total
        if before.unit == after.unit and after.count > before.count:
            return ""
        return "a resumed run can only become longer: leave it, or give another run.dir"
    return "leave it as it was, or give another run.dir to start anew"


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif _sections_of(old) and _sections_of(new) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{path}.{number}")
    elif old != new:
        yield path, old, new


def _sections_of(value: Any) -> bool:
    """Whether it is a list of sections."""
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)


# -- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(yaml.MAX_BYTES + 1).decode()  # a wrong path may lead to gigabytes
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file{_ready()}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a configuration: {error}") from None
    try:
        values = yaml.parse(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: a configuration is a mapping of sections ({', '.join(Config.model_fields)}), found {values!r:.60}"
        )
    return values


def _ready() -> str:
    found = sorted(str(path) for path in Path("configs").glob("*/*.yaml"))
    return f"; ready ones: {', '.join(found)}" if found else ""


def _apply(values: dict[str, Any], override: str) -> list[Problem]:
    """Write one `section.key=value` into the values."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return [
            Problem(override, "not of the form section.key=value", "write for example optimizer.learning_rate=3e-4")
        ]
    try:
        value = yaml.parse(text)
    except ValueError as error:
        return [Problem(override, f"the value is not valid YAML: {error}", "")]
    place = values
    for depth, key in enumerate(keys[:-1], start=1):
        inner = place.setdefault(key, {})
        if inner is None:  # a section without a value, or one that may be null
            inner = place[key] = {}
        if not isinstance(inner, dict):
            message = f"{'.'.join(keys[:depth])} is {inner!r:.60}, no section"
            return [Problem(path.strip(), message, "give that a value, or name a field of a section")]
        place = inner
    place[keys[-1]] = value
    return []


# -- pydantic's errors in this program's words -----------------------------------------------------------------------


def _translate(error: ValidationError) -> list[Problem]:
    between: list[Problem] = []
    found: dict[str, tuple[int, Problem]] = {}
    for item in error.errors():
        keys = [str(key) for key in item["loc"]]
        reason = item.get("ctx", {}).get("error")
        if isinstance(reason, Inconsistent):
            between += [problem._replace(path=".".join([*keys, problem.path])) for problem in reason.problems]
            continue
        problem = _unknown(keys) if item["type"] == "extra_forbidden" else _invalid(keys, item)
        # Each alternative of a union has its own error: the one that was followed furthest is meant.
        if len(keys) > found.get(problem.path, (0, problem))[0]:
            found[problem.path] = len(keys), problem
    return [*(problem for _, problem in found.values()), *between]


def _unknown(keys: list[str]) -> Problem:
    section = _section(keys[:-1])
    names = list(section.model_fields)
    inside = sorted((name for name in names if keys[-1] in name), key=len)
    close = inside[:1] or difflib.get_close_matches(keys[-1], names, 1)
    near = [".".join([*keys[:-1], name]) for name in close]
    elsewhere = [f"{name}.{keys[-1]}" for name, part in _sections() if keys[-1] in part.model_fields]
    meant = " or ".join([*near, *elsewhere])
    mend = f"did you mean {meant}?" if meant else f"there are: {', '.join(names)}"
    return Problem(".".join(keys), "unknown key", mend)


def _invalid(keys: list[str], item: Any) -> Problem:
    field = _field(keys)
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be").replace("a valid ", "a ")
    message = message.replace("a integer", "a whole number").replace("a boolean", "true or false")
    if item["type"] == "model_type":
        message = "must be a section, {key: value, ...}"
    if item["type"] == "missing":
        message = "is missing"
    elif item["type"] != "value_error":
        message = f"{message}, found {item['input']!r:.60}"
    path = ".".join(keys) or "config"
    # Unions add the name of the alternative that was tried to the path: keep the field's own.
    while field is None and len(keys) > 1:
        keys = keys[:-1]
        field, path = _field(keys), ".".join(keys)
    mend = f"it is: {field.description}" if field is not None and field.description else ""
    return Problem(path, message, mend or "give it fields, or leave it out")


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in Config.model_fields.items():
        if (part := _model_of(field)) is not None:
            yield name, part


def _section(keys: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for key in keys:
        if key in section.model_fields:
            section = _model_of(section.model_fields[key]) or section
    return section


def _field(keys: list[str]) -> FieldInfo | None:
    return _section(keys[:-1]).model_fields.get(keys[-1]) if keys else None


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section class of a field, also of one that may be null or is a list of sections."""
    annotation = field.annotation
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType, list) else (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


# -- --help-config ---------------------------------------------------------------------------------------------------


def help_config() -> str:
    """Every field with its default and meaning, as YAML that could be used."""
    lines = ["# Every field of a run's configuration, at its default."]
    for name, field in Config.model_fields.items():
        part = _model_of(field)
        if part is None:
            lines.append(_line(name, field, ""))
            continue
        lines += ["", f"{name}:  # {(part.__doc__ or '').strip().splitlines()[0]}"]
        for key, inner in part.model_fields.items():
            lines.append(_line(key, inner, "  "))
            nested, indent = (
                _model_of(inner),
                "    " if _is_section(inner) else "  #   ",
            )  # null by default: as comments
            lines += [f"{indent}{_entry(deep, what)}" for deep, what in nested.model_fields.items()] if nested else []
    return "\n".join(lines) + "\n"


def _is_section(field: FieldInfo) -> bool:
    """Whether its default is one, whose fields follow."""
    return isinstance(field.default, BaseModel)


def _line(name: str, field: FieldInfo, indent: str) -> str:
    return indent + _entry(name, field)


def _entry(name: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        value = "..."
    else:
        plain = str(default) if isinstance(default, Span) else list(default) if isinstance(default, tuple) else default
        value = "" if _is_section(field) else yaml.dump(plain).removesuffix("...\n").strip()
    return f"{f'{name}: {value}':<34}  # {field.description}"
