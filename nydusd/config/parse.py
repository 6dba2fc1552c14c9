"""From parsed JSON or TOML to the tables of `model`: types, missing keys, unknown keys. No rule about values beyond ranges.

Pure. msgspec could convert by itself, but its messages speak of the types of this program and it does not report unknown
keys; so this walks msgspec's own description of the tables, and there is still one definition of each key.
"""

from __future__ import annotations

import datetime
from functools import cache
from typing import Final, TypeVar, cast

from msgspec import inspect as schema

from nydusd.config.model import Table

MAX_UNKNOWN: Final = 100
"""So many unknown keys are named; more in one text say nothing further."""

T = TypeVar("T", bound=Table)


class BadKey(Exception):
    """A key breaks a rule. `path` is dotted, as in `backend.localfs.dir`."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem


class TableReader:
    """Converts tables of one text and collects the paths of its unknown keys."""

    def __init__(self) -> None:
        self.unknown: list[str] = []

    def table(self, cls: type[T], value: object, path: str) -> T:
        """Convert one table. Raises `BadKey`."""
        if not isinstance(value, dict):
            raise BadKey(path, f"must be a table, but is {kind_of(value)}")
        found: dict[str, object] = {}
        known = _fields(cls)
        for name, spec in known.items():
            where = join(path, name)
            if name in value:
                found[spec.name] = self._value(spec.type, value[name], where)
            elif spec.required:
                raise BadKey(where, f"is missing, it must be {_wanted(spec.type)}")
        for key in value:
            if key not in known and len(self.unknown) < MAX_UNKNOWN:
                self.unknown.append(join(path, key))
        return cls(**found)

    def _value(self, kind: schema.Type, value: object, path: str) -> object:
        match kind:
            case schema.UnionType(types=types):
                inner = next(t for t in types if not isinstance(t, schema.NoneType))
                return None if value is None else self._value(inner, value, path)
            case schema.StructType(cls=cls):
                return self.table(cast(type[Table], cls), value, path)
            case schema.VarTupleType(item_type=item) if isinstance(value, list):
                return tuple(self._value(item, entry, f"{path}[{number}]") for number, entry in enumerate(value))
            case schema.DictType(value_type=schema.CustomType()) if isinstance(value, dict):
                return value
            case schema.DictType(value_type=item) if isinstance(value, dict):
                return {key: self._value(item, entry, join(path, key)) for key, entry in value.items()}
            case schema.CustomType():
                return value
            case schema.BoolType() if isinstance(value, bool):
                return value
            case schema.StrType() if isinstance(value, str):
                return value
            case schema.IntType() if isinstance(value, int) and not isinstance(value, bool):
                return _in_range(kind, value, path)
            case schema.FloatType() if isinstance(value, int | float) and not isinstance(value, bool):
                return float(_in_range(kind, value, path))
        raise BadKey(path, f"must be {_wanted(kind)}, but is {kind_of(value)}")


def _in_range(kind: schema.IntType | schema.FloatType, value: float, path: str) -> float:
    low, high = kind.ge, kind.le
    if low is None or high is None or low <= value <= high:
        return value
    shown = str(value) if abs(value) < 1 << 70 else "far outside"
    raise BadKey(path, f"must be {_wanted(kind)}, but is {shown}")


@cache
def _fields(cls: type[Table]) -> dict[str, schema.Field]:
    info = schema.type_info(cls)
    assert isinstance(info, schema.StructType)
    return {spec.encode_name: spec for spec in info.fields if spec.name not in cls.COMPUTED}


def _wanted(kind: schema.Type) -> str:
    match kind:
        case schema.UnionType(types=types):
            return _wanted(next(t for t in types if not isinstance(t, schema.NoneType)))
        case schema.StructType() | schema.DictType(value_type=schema.CustomType()):
            return "a table"
        case schema.DictType():
            return "a table of text values"
        case schema.VarTupleType(item_type=schema.StrType()):
            return "a list of texts"
        case schema.VarTupleType():
            return "a list of tables"
        case schema.BoolType():
            return "true or false"
        case schema.IntType(ge=low, le=high):
            return f"a whole number from {low} to {high}"
        case schema.FloatType(ge=low, le=high):
            return f"a number from {low:g} to {high:g}"
    return "text"


def kind_of(value: object) -> str:
    """What a value is, in the words of a configuration text; never the value, which may be a secret."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case dict():
            return "a table"
        case list():
            return "a list"
        case str():
            return "text"
        case int():
            return "a whole number"
        case float():
            return "a fraction"
        case datetime.date() | datetime.time():
            return "a date or time"
    return "something else"


def join(path: str, key: str) -> str:
    """`path.key`, with a key that is not a plain word quoted and cut."""
    if not key.isascii() or not key.replace("-", "_").replace("_", "a").isalnum() or len(key) > 64:
        key = repr(key[:64])
    return f"{path}.{key}" if path else key
