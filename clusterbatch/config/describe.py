"""The configuration's keys with their types, defaults and meaning, read from the sections themselves."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from clusterbatch.config.base import Section
from clusterbatch.config.load import RunConfig
from clusterbatch.errors import UsageError


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, type, default in YAML's spelling (None: must be given) and meaning.

    affects_results: whether another value makes another artifact; if not, it only changes speed, memory or place.
    within: the key of whose value it is a part, an optional section or one in a list or map; otherwise None.
    """

    name: str
    type: str
    default: str | None
    meaning: str
    affects_results: bool
    within: str | None = None


def describe(sections: Sequence[str] = ()) -> list[Key]:
    """Return the keys of `sections` (all of them by default). Raises UsageError for an unknown section.

    Keys of an optional section follow it (`train.lora.rank`), as do those of sections in a list
    (`batches.curriculum[].epochs`) or in a map (`train.source_prompts.<name>.query`).
    """
    names = list(RunConfig.model_fields)
    for section in sections:
        if section not in names:
            close = get_close_matches(section, names, n=1)
            raise UsageError(f"config: unknown section {section!r}" + (f", did you mean {close[0]}?" if close else ""))
    return [
        key
        for name, field in RunConfig.model_fields.items()
        if not sections or name in sections
        for key in _keys(name, field)
    ]


def as_yaml(sections: Sequence[str] = ()) -> str:
    """Return a configuration file with all keys of `sections`, explained and with their defaults.

    Keys inside optional sections, lists and maps are left out, as these are empty by default.
    """
    lines: list[str] = []
    above: list[str] = []
    for key in describe(sections):
        if key.within is not None:
            continue
        *parents, leaf = key.name.split(".")
        for depth, parent in enumerate(parents):
            if parents[: depth + 1] != above[: depth + 1]:
                lines += [*([""] if depth == 0 else []), f"{'  ' * depth}{parent}:"]
        above = parents
        indent = "  " * len(parents)
        lines += [f"{indent}# {line}" for line in textwrap.wrap(key.meaning, 116 - len(indent))]
        lines += [indent + line for line in _assignment(leaf, key.default)]
    return "\n".join(lines).lstrip("\n")


@dataclass(frozen=True)
class Difference:
    """A key that has another value in another configuration; both in YAML's spelling, None if it has none there."""

    name: str
    one: str | None
    other: str | None


def differences(one: RunConfig, other: RunConfig) -> list[Difference]:
    """Return the keys in which two configurations differ, in the order of `describe`; defaults are filled in."""
    values = [dict(_leaves(config.model_dump(mode="json"))) for config in (one, other)]
    names = list(dict.fromkeys([*values[0], *values[1]]))
    return [
        Difference(name, *(_yaml(each[name]) if name in each else None for each in values))
        for name in names
        if any(name not in each for each in values) or values[0][name] != values[1][name]
    ]


def _leaves(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _assignment(name: str, default: str | None) -> list[str]:
    """Return `name: default`; a map with entries takes a line for each."""
    if default is not None and default.startswith("{") and default != "{}":
        entries: dict[str, Any] = json.loads(default)
        return [f"{name}:", *(f"  {key}: {json.dumps(value)}" for key, value in entries.items())]
    return [f"{name}: {default or ''}".rstrip()]


def _keys(name: str, field: FieldInfo, within: str | None = None) -> Iterator[Key]:
    section = _section(field.annotation)
    if section is not None and field.default is not None:
        for below, inner in section.model_fields.items():
            yield from _keys(f"{name}.{below}", inner, within)
        return
    extra = field.json_schema_extra
    yield Key(
        name,
        _type_name(field.annotation),
        None if field.is_required() else _yaml(field.get_default()),
        " ".join((field.description or "").split()),
        not (isinstance(extra, dict) and extra.get("operational")),
        within,
    )
    for prefix, inside in _sections_inside(name, field.annotation):
        for below, inner in inside.model_fields.items():
            yield from _keys(f"{prefix}.{below}", inner, name)


def _sections_inside(name: str, annotation: Any) -> Iterator[tuple[str, type[Section]]]:
    """Yield the sections that a value of this type may hold, with the name under which it holds each."""
    if (section := _section(annotation)) is not None:
        yield name, section
        return
    marks = {list: "[]", dict: ".<name>"}
    for part in get_args(annotation):
        yield from _sections_inside(name + marks.get(get_origin(annotation), ""), part)


def _section(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _yaml(value: Any) -> str:
    if isinstance(value, Section):
        value = value.model_dump(mode="json")
    elif isinstance(value, tuple):
        value = list(value)
    # YAML's flow style is a superset of JSON; plain words need no quotes.
    return value if isinstance(value, str) and value.isidentifier() else json.dumps(value, ensure_ascii=False)


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (Union, UnionType):
        return " | ".join("null" if part is NoneType else _type_name(part) for part in arguments)
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"map of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    if annotation is Any:
        return "any"
    if _section(annotation) is not None:
        return "section"
    names = {str: "text", int: "integer", float: "number", bool: "true | false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
