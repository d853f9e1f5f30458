"""Settings objects: frozen dataclasses whose fields carry their help, range and choices, so that
all three are written once.

The command line makes its flags of them, OpenOOD's adapter its keys, and construction refuses what
is out of range.
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
        default: Its value unless told otherwise; its type, and that of each entry of a tuple, is
            the type of the setting.
        help: What it means, in a sentence or two, with unit and source.
        low: Smallest value allowed.
        high: Largest value allowed.
        above: Whether the smallest is itself refused.
        choices: The values allowed, where they are words.
    """
    return field(
        default=default,
        metadata={"help": help, "low": low, "high": high, "above": above, "choices": choices},
    )


@dataclass(frozen=True)
class Settings:
    """What every settings object does: refuse values out of range, and hold plain Python numbers
    whatever came.

    Raises:
        ValueError: If a value is of the wrong type or out of range, with its name, its range and
            what came.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(
                self, f.name, _checked(f.name, getattr(self, f.name), f.default, f.metadata)
            )


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
            raise ValueError(
                f"Expected {name} to be one of {', '.join(map(repr, about['choices']))}, but got {value!r}"
            )
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
