"""What library users hand in, checked at the door: a wrong type or value is one error that names the argument."""

from __future__ import annotations

import math
import numbers

from cacheflow.errors import ConfigError


def whole(name: str, value: object, *, least: int | None = None, most: int | None = None) -> int:
    """A whole number of Python or numpy as an ``int``; true and false are none.

    Raises:
        ConfigError: It is none, or out of range.
    """
    wanted = "a whole number" + ("" if least is None else f" of at least {least}")
    wanted += "" if most is None else f" and at most {most}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigError(f"{name} is {value!r}, must be {wanted}")
    number = int(value)
    if (least is not None and number < least) or (most is not None and number > most):
        raise ConfigError(f"{name} is {_shown(number)}, must be {wanted}")
    return number


def number(name: str, value: object, *, above: float | None = None, least: float | None = None) -> float:
    """A number of Python or numpy as a ``float``, possibly infinite; true and false are none.

    Args:
        name: What the caller called it.
        value: What was handed in.
        above: It must be greater than this.
        least: Or at least this.

    Raises:
        ConfigError: It is no number, or out of range.
    """
    wanted = (
        "a number"
        + ("" if above is None else f" above {above:g}")
        + ("" if least is None else f" of {least:g} or more")
    )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{name} is {value!r}, must be {wanted}")
    try:
        found = float(value)
    except OverflowError:
        found = math.nan
    if math.isnan(found) or (above is not None and not found > above) or (least is not None and not found >= least):
        raise ConfigError(f"{name} is {value!r}, must be {wanted}")
    return found


def timeout(name: str, value: object) -> float | None:
    """Seconds to wait; None, as also for ever, for no limit.

    Raises:
        ConfigError: It is neither None nor a number of 0 or more.
    """
    if value is None:
        return None
    seconds = number(name, value, least=0)
    return None if seconds == math.inf else seconds


def flag(name: str, value: object) -> bool:
    """True or false; nothing else stands for them, ``"no"`` least of all.

    Raises:
        ConfigError: It is neither.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, must be True or False")
    return value


def require_instance(name: str, value: object, kind: type, *, hint: str = "") -> None:
    """Refuse what is no object of a class.

    Raises:
        ConfigError: It is none; the message ends with the hint how to get one.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is of type {type(value).__name__}, must be of {kind.__name__}{hint and ': ' + hint}")


def _shown(number: int) -> str:
    return str(number) if abs(number) < 10**60 else f"a number of {number.bit_length()} bits"
