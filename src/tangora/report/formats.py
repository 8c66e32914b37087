"""How numbers are written in tables, sentences and figures. ``None`` becomes a dash."""

from collections.abc import Callable, Iterable

from tangora.report.statistics.intervals import Interval

MISSING = "–"
MINUS = "\N{MINUS SIGN}"

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_COUNT_UNITS = ("", " k", " M", " B")


def metric(value: float | None) -> str:
    """Write a metric with four decimals, or two when it is large."""
    return MISSING if value is None else _signed(value, "")


def difference(value: float | None) -> str:
    """Write a difference of metrics, always with its sign."""
    return MISSING if value is None else _signed(value, "+")


def interval(value: Interval | None, *, sign: bool = False) -> str:
    """Write both ends of an interval."""
    if value is None:
        return MISSING
    low, high = (_signed(end, "+" if sign else "") for end in value)
    return f"{low} to {high}"


def _signed(value: float, sign: str) -> str:
    decimals = 4 if abs(value) < 100 else 2
    return f"{value:{sign}z.{decimals}f}".replace("-", MINUS)  # z: no negative zero


def learning_rate(value: float | None) -> str:
    """Write a learning rate in the shortest way that names it."""
    if value is None:
        return MISSING
    if value >= 0.01:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def seconds(value: float | None) -> str:
    """Write a duration."""
    if value is None:
        return MISSING
    if value < 60:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def span(value: Interval | None, write: Callable[[float], str]) -> str:
    """Write a range from the smallest to the largest."""
    if value is None:
        return MISSING
    low, high = (write(end) for end in value)
    return MISSING if low == high else f"{low} to {high}"


def milliseconds(value: float | None) -> str:
    """Write a short duration."""
    return MISSING if value is None else f"{value:.1f} ms"


def size(value: int | None) -> str:
    """Write an amount of memory, in powers of 1000."""
    return MISSING if value is None else _scaled(value, _BYTE_UNITS, " ")


def count(value: int | None) -> str:
    """Write a large number of things."""
    return MISSING if value is None else _scaled(value, _COUNT_UNITS, "")


def _scaled(value: int, units: tuple[str, ...], gap: str) -> str:
    power = 0
    while power < len(units) - 1 and value >= 999.5 * 1000**power:
        power += 1
    number = value / 1000**power
    decimals = 0 if power == 0 or number >= 100 else 1
    return f"{number:.{decimals}f}{gap}{units[power]}"


def share(value: float | None) -> str:
    """Write a share as a percentage."""
    return MISSING if value is None else f"{100 * value:z.0f} %".replace("-", MINUS)


def shares(value: Interval | None) -> str:
    """Write both ends of an interval of shares as percentages."""
    return MISSING if value is None else " to ".join(share(end) for end in value)


def p_value(value: float | None) -> str:
    """Write a p-value."""
    if value is None:
        return MISSING
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def small_share(value: float | None) -> str:
    """Write a share as a percentage with two figures, for shares that may be small."""
    if value is None:
        return MISSING
    percent = 100 * value
    if percent >= 9.95:
        return f"{percent:.0f} %"
    return f"{percent:.1f} %" if percent >= 0.95 or percent == 0 else f"{percent:.2g} %"


def tenths(value: float) -> str:
    """Write a share as a percentage with one decimal, for shares that are compared with each other."""
    return f"{100 * value:.1f} %"


def significant(value: float | None) -> str:
    """Write a number of any size with three figures."""
    return MISSING if value is None else f"{value:.3g}".replace("-", MINUS)


def plural(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listing(names: Iterable[str]) -> str:
    """Write a list of names as in a sentence."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
