"""What a caller asks of a session, checked before anything is looked up or computed."""

from __future__ import annotations

from collections.abc import Iterable

from cacheflow.embedded.host import SessionHost
from cacheflow.engine.arguments import flag, whole
from cacheflow.engine.sampling import Sampling
from cacheflow.errors import ConfigError, PromptError
from cacheflow.stores.keys import as_token_array


def checked_tokens(name: str, tokens: object) -> list[int]:
    """Token ids as a list, possibly empty; whether a vocabulary has them is not asked.

    Raises:
        PromptError: Not one-dimensional integers of 0 or more.
    """
    if isinstance(tokens, list | tuple) and any(isinstance(each, bool) for each in tokens):
        raise PromptError(f"{name} must be token ids, got True or False among them")
    try:
        found: list[int] = as_token_array(tokens).tolist()  # type: ignore[arg-type]
    except PromptError as error:
        raise PromptError(f"{name}: {error}") from error
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # what numpy cannot make an array of
        raise PromptError(f"{name} must be token ids, got a {type(tokens).__name__}: {error}") from error
    return found


def checked_answer(sampling: object, stop_tokens: object, save: object) -> frozenset[int]:
    """Refuse what no answer can be made by; returns the tokens that end it.

    Raises:
        ConfigError: One of them is of another type; names it.
    """
    if sampling is not None and not isinstance(sampling, Sampling):
        raise ConfigError(f"sampling is {sampling!r}, must be a Sampling, or None for greedy")
    flag("save", save)
    if isinstance(stop_tokens, str | bytes) or not isinstance(stop_tokens, Iterable):
        raise ConfigError(f"stop_tokens is {stop_tokens!r}, must be token ids, such as frozenset({{2}})")
    return frozenset(whole("a token of stop_tokens", each, least=0) for each in stop_tokens)


def check_free(engine: SessionHost) -> None:
    """Refuse to compute beside a batch: it has the model, and the rates of the link, to itself.

    Raises:
        ConfigError: A batch is open.
    """
    if engine.in_batch:
        raise ConfigError("this session's engine has an open batch: submit the turn to it, or close the batch first")


def check_cancel(cancel: object) -> None:
    """Refuse a ``cancel`` that cannot be asked.

    Raises:
        ConfigError: It is neither None nor an event.
    """
    if cancel is not None and (isinstance(cancel, type) or not callable(getattr(cancel, "is_set", None))):
        raise ConfigError(f"cancel is {cancel!r}, must be a threading.Event or None")
