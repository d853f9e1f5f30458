"""Settings objects: frozen dataclasses whose fields have their help, range and choices, each
written once.

The command line makes its flags of them, OpenOOD's adapter its keys, and construction refuses
values out of range.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import inf
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from tie_ext.utils.checks import check_number


def setting(
    default: Any,
    help: str,
    *,
    low: float = -inf,
    high: float = inf,
    above: bool = False,
    choices: tuple[str, ...] | None = None,
    **flag: str,
) -> Any:
    """A field of a settings object: a number, word or bool, None where its annotation allows that,
    or a tuple of them.

    Arguments:
        default: The default; ``MISSING`` where a value must be given.
        help: Its meaning in a sentence or two, with unit and source.
        low: Smallest value allowed.
        high: Largest value allowed.
        above: Whether ``low`` itself is refused.
        choices: The values allowed, where they are words.
        flag: ``metavar`` and ``group`` of its flag.
    """
    about = {"help": help, "low": low, "high": high, "above": above, "choices": choices}
    return field(default=default, metadata={**about, "flag": flag})


@dataclass(frozen=True)
class Settings:
    """The base of settings objects: it refuses values out of range, and turns numbers of any type
    into Python's, and lists into tuples.

    Raises:
        ValueError: If a value is of the wrong type or out of range, with its name and its range.
    """

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for f in fields(self):
            if f.metadata:
                value = _checked(f.name, getattr(self, f.name), kinds[f.name], f.metadata)
                object.__setattr__(self, f.name, value)


def plain(settings: Settings) -> dict[str, Any]:
    """The settings as JSON has them: minus infinity is the word ``-inf``, a tuple a list."""
    values = asdict(settings)  # type: ignore[call-overload]
    return {
        name: "-inf" if value == -inf else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Where settings by name differ, as an error says it; nothing where they do not."""
    return ", ".join(
        f"{name} {found.get(name)!r} instead of {wanted.get(name)!r}"
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    )


def _checked(name: str, value: Any, kind: Any, about: Any) -> Any:
    parts = get_args(kind)
    if NoneType in parts:
        return value if value is None else _checked(name, value, parts[0], about)
    if get_origin(kind) is tuple:
        length = None if Ellipsis in parts else len(parts)
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            what = "a list" if length is None else f"{length} numbers"
            raise ValueError(f"Expected {name} to be {what}, but got {value!r}")
        entries = tuple(_checked(name, entry, parts[0], about) for entry in value)
        if length is not None and list(entries) != sorted(entries):
            raise ValueError(
                f"Expected {name} to be a range, its smaller end first, but got {value!r}"
            )
        return entries
    if about["choices"] is not None and value not in about["choices"]:
        choices = ", ".join(map(repr, about["choices"]))
        raise ValueError(f"Expected {name} to be one of {choices}, but got {value!r}")
    if kind in (int, float):
        value = -inf if value == "-inf" else value  # as JSON and YAML write it
        low, high, above = (about[key] for key in ("low", "high", "above"))
        check_number(name, value, low, high, integer=kind is int, above=above)
        return kind(value)
    if not isinstance(value, kind):
        raise ValueError(f"Expected {name} to be of type {kind.__name__}, but got {value!r}")
    return value
