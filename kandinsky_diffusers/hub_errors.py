"""What goes wrong with the Hub, in one message that says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any

from huggingface_hub.errors import HTTPError


ADVICE = {
    401: "the Hub does not accept the token: log in again with `hf auth login`, or correct HF_TOKEN",
    403: "the token may not write there: make one that may, at https://huggingface.co/settings/tokens",
    404: "the Hub has no such user, organization or repository, or the token may not see it",
    409: "somebody else is changing the repository: try again",
    412: "somebody else has changed the repository: try again",
    413: "the Hub finds it too large",
    429: "the Hub has had too many requests: try again in some minutes",
}
_LINE = re.compile(r"\s+")


class HubError(OSError):
    """A push is not possible, or was broken off; the message says what to do about it."""


@contextmanager
def advice_on(failure: str) -> Iterator[None]:
    """Make one message with advice of whatever the Hub client raises."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: around what went wrong in a thread
        raise HubError(f"{failure}: {_advice(error)}.") from error


def _advice(error: BaseException) -> str:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _advice(error.__cause__)
    response = getattr(error, "response", None)
    if response is not None:
        status = response.status_code
        said = getattr(error, "server_message", None)
        advice = ADVICE.get(
            status, "the Hub has a fault of its own: try again later" if status >= 500 else "it refuses"
        )
        return f"{advice} (HTTP {status}{f', {_one_line(said)}' if said else ''})"
    if isinstance(error, JSONDecodeError):
        return "the answer of the Hub cannot be read: try again later"
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return f"the connection to the Hub failed ({_one_line(error)}): try again"
    return _one_line(error).rstrip(".")


def _one_line(said: Any) -> str:
    return _LINE.sub(" ", str(said)).strip()
