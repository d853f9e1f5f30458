"""Settings objects: frozen dataclasses whose fields have their help, range and choices, each
written once.

The command line makes its flags of them, OpenOOD's adapter its keys, and construction refuses
values out of range.
"""

from dataclasses import asdict, dataclass, field, fields
from math import inf
from typing import Any

from tie_ext.utils.checks import check_number


def setting(
    default: Any,
    help: str,
    *,
    low: float = -inf,
    high: float = inf,
    above: bool = False,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A field of a settings object.

    Arguments:
        default: The default; its type, and that of each entry of a tuple, is that of the setting.
        help: Its meaning in a sentence or two, with unit and source.
        low: Smallest value allowed.
        high: Largest value allowed.
        above: Whether ``low`` itself is refused.
        choices: The values allowed, where they are words.
    """
    return field(
        default=default,
        metadata={"help": help, "low": low, "high": high, "above": above, "choices": choices},
    )


@dataclass(frozen=True)
class Settings:
    """The base of settings objects: it refuses values out of range, and turns numbers of any type
    into Python's.

    Raises:
        ValueError: If a value is of the wrong type or out of range, with its name and its range.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            value = _checked(f.name, getattr(self, f.name), f.default, f.metadata)
            object.__setattr__(self, f.name, value)


def plain(settings: Settings) -> dict[str, Any]:
    """The settings as JSON has them: minus infinity is the word ``-inf``, a tuple a list."""
    values = asdict(settings)  # type: ignore[call-overload]
    return {
        name: "-inf" if value == -inf else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def _checked(name: str, value: Any, default: Any, about: Any) -> Any:
    if about["choices"] is not None:
        if value not in about["choices"]:
            choices = ", ".join(map(repr, about["choices"]))
            raise ValueError(f"Expected {name} to be one of {choices}, but got {value!r}")
        return value
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or len(value) != len(default):
            raise ValueError(f"Expected {name} to be {len(default)} numbers, but got {value!r}")
        pair = tuple(_checked(name, v, d, about) for v, d in zip(value, default, strict=True))
        if list(pair) != sorted(pair):
            raise ValueError(
                f"Expected {name} to be a range, its smaller end first, but got {value!r}"
            )
        return pair
    integer = isinstance(default, int)
    if value == "-inf":  # as JSON and YAML write it
        value = -inf
    check_number(name, value, about["low"], about["high"], integer=integer, above=about["above"])
    return int(value) if integer else float(value)
