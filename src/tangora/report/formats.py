"""Number formats of tables, sentences and figures. ``None`` becomes a dash."""

from collections.abc import Callable, Iterable
from typing import TypeAlias

from tangora.report.statistics.intervals import Interval

MISSING = "–"
MINUS = "\N{MINUS SIGN}"

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_COUNT_UNITS = ("", " k", " M", " B")

_Write: TypeAlias = Callable[[float], str]


def _or_dash(write: _Write) -> Callable[[float | None], str]:
    def written(value: float | None) -> str:
        return MISSING if value is None else write(value)

    written.__doc__ = write.__doc__
    return written


@_or_dash
def metric(value: float) -> str:
    """Write a metric with four decimals, or two when it is large."""
    return _signed(value, "")


@_or_dash
def difference(value: float) -> str:
    """Write a difference of metrics, always with its sign."""
    return _signed(value, "+")


def interval(value: Interval | None, *, sign: bool = False) -> str:
    """Write both ends of an interval."""
    return MISSING if value is None else " to ".join(_signed(end, "+" if sign else "") for end in value)


def _signed(value: float, sign: str) -> str:
    decimals = 4 if abs(value) < 100 else 2
    return f"{value:{sign}z.{decimals}f}".replace("-", MINUS)  # z: no negative zero


@_or_dash
def learning_rate(value: float) -> str:
    """Write a learning rate in the shortest way that names it."""
    if value >= 0.01:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


@_or_dash
def seconds(value: float) -> str:
    """Write a duration."""
    if value < 60:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@_or_dash
def milliseconds(value: float) -> str:
    """Write a short duration."""
    return f"{value:.1f} ms"


def span(value: Interval | None, write: _Write) -> str:
    """Write a range from the smallest to the largest."""
    if value is None:
        return MISSING
    low, high = (write(end) for end in value)
    return MISSING if low == high else f"{low} to {high}"


@_or_dash
def size(value: float) -> str:
    """Write an amount of memory, in powers of 1000."""
    return _scaled(value, _BYTE_UNITS, " ")


@_or_dash
def count(value: float) -> str:
    """Write a large number of things."""
    return _scaled(value, _COUNT_UNITS, "")


def _scaled(value: float, units: tuple[str, ...], gap: str) -> str:
    power = 0
    while power < len(units) - 1 and value >= 999.5 * 1000**power:
        power += 1
    number = value / 1000**power
    decimals = 0 if power == 0 or number >= 100 else 1
    return f"{number:.{decimals}f}{gap}{units[power]}"


@_or_dash
def share(value: float) -> str:
    """Write a share as a percentage."""
    return f"{100 * value:z.0f} %".replace("-", MINUS)


def shares(value: Interval | None) -> str:
    """Write both ends of an interval of shares as percentages."""
    return MISSING if value is None else " to ".join(share(end) for end in value)


@_or_dash
def small_share(value: float) -> str:
    """Write a share as a percentage with two figures, for shares that may be small."""
    percent = 100 * value
    if percent >= 9.95:
        return f"{percent:.0f} %"
    return f"{percent:.1f} %" if percent >= 0.95 or percent == 0 else f"{percent:.2g} %"


def tenths(value: float) -> str:
    """Write a share as a percentage with one decimal, for shares that are compared with each other."""
    return f"{100 * value:.1f} %"


@_or_dash
def p_value(value: float) -> str:
    """Write a p-value."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


@_or_dash
def significant(value: float) -> str:
    """Write a number of any size with three figures."""
    return f"{value:.3g}".replace("-", MINUS)


def sentences(*said: str | None) -> list[str]:
    """Leave out what is not to be said."""
    return [sentence for sentence in said if sentence]


def plural(number: int, noun: str, several: str | None = None) -> str:
    """Write a number of things, of which several end with an s or as given."""
    return f"{number} {noun}" if number == 1 else f"{number} {several or f'{noun}s'}"


def listing(names: Iterable[str]) -> str:
    """Write a list of names as in a sentence."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def ranks(values: Iterable[int]) -> str:
    """Write the rank of an adapter, or the range of its ranks."""
    low, *_, high = sorted(values) * 2
    return f"rank {low}" if low == high else f"ranks {low} to {high}"
