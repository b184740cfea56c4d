"""Base of all sections of the configuration: strict keys, frozen values, and an identity."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


def _absolute(address: str) -> str:
    if "://" in address or not address.strip():
        return address
    if address.startswith("s3:"):
        # Python's pathlib, for example, makes one slash of two: nothing may be written to a local folder of that name.
        raise ValueError(f"expected s3://bucket/prefix (got {address!r})")
    return os.path.abspath(os.path.expanduser(address))


def _absolute_folder(name: str) -> str:
    return _absolute(name) if os.path.isdir(os.path.expanduser(name)) else name


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"expected auto, cpu or cuda (got {name!r})")
    return name


# A URI or a local path. Paths become absolute when the configuration is read: workers have other working directories.
Address = Annotated[str, AfterValidator(_absolute)]
# The name of a model, a URI, or a local folder, likewise.
ModelName = Annotated[str, AfterValidator(_absolute_folder)]
# A misspelt one would be found only when the stage begins, after all those before it.
Device = Annotated[str, AfterValidator(_known_device)]
# What all generators take: torch's end at 2^64, METIS' at 2^63, and NumPy's take no negative ones.
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _types(annotation: Any) -> set[Any]:
    """Return the types that an annotation is made of."""
    return {annotation}.union(*(_types(each) for each in get_args(annotation)))


class Section(BaseModel):
    """One section of a run's configuration. Unknown keys are refused, values cannot change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Raise ValueError for true and false where numbers are expected, which pydantic reads as 1 and 0."""
        assert info.field_name is not None
        allowed = _types(cls.model_fields[info.field_name].annotation)
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        if {int, float} & allowed and not {bool, Any} & allowed and any(isinstance(item, bool) for item in items):
            raise ValueError("expected a number, not true or false")
        return value

    def identity(self) -> dict[str, Any]:
        """Return the values that decide what is computed, without those that only decide how fast (`operational`)."""
        kept = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            marks = extra if isinstance(extra, dict) else {}
            value = getattr(self, name)
            if marks.get("operational") or (marks.get("added") and value == field.get_default()):
                continue
            kept[name] = value.identity() if isinstance(value, Section) else _plain(value)
        return kept


def operational(default: Any = ..., **constraints: Any) -> Any:
    """A field that changes speed, memory or place, never a result; it is left out of fingerprints."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)


def added(default: Any, **constraints: Any) -> Any:
    """A field added later: left out of fingerprints while it has its default, so that finished work stays finished."""
    return Field(default, json_schema_extra={"added": True}, **constraints)


def fingerprint(*parts: Any) -> str:
    """Return 16 hex digits over the canonical JSON of `parts`, with sections by their identity."""
    plain = [_plain(part) for part in parts]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.identity()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
