"""Errors in the words of each dialect: one table, used for whole answers and for events in a stream.

Native routes say `{"detail": message, "code": …}`, and for a body that isn't what the route takes FastAPI's 422,
`{"detail": [{"loc", "msg", "type", "input"?}]}`. Under `/v1` it is OpenAI's `{"error": {"message", "type", "param", "code"}}`,
with 400 for every bad request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.errors import BadRequest, HeadraceError, UnknownField
from headrace.http.answers import Whole, json_answer

Location = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a body."""

    loc: Location
    """Where, without the leading `body`: `("messages", 0, "role")`."""
    message: str
    kind: str = "value_error"
    """Pydantic's word for it, such as `missing`."""
    shown: Any = None
    """The input at fault, where it is small enough to be repeated."""


class InvalidBody(BadRequest):
    """The body isn't what the route takes. There is at least one fault."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        first = faults[0]
        place = dotted(first.loc)
        super().__init__(f"{place}: {first.message}" if place else first.message, param=place or None)
        self.faults = faults


def dotted(loc: Location) -> str:
    """`messages[0].role`, as OpenAI names a parameter."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def status_of(error: HeadraceError, *, openai: bool) -> int:
    return 422 if isinstance(error, InvalidBody) and not openai else error.status


def openai_error(error: HeadraceError) -> dict[str, Any]:
    kind = _OPENAI_TYPES.get(error.status) or ("invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.told, "type": kind, "param": error.param, "code": error.code}}


def native_error(error: HeadraceError) -> dict[str, Any]:
    if not isinstance(error, InvalidBody):
        return {"detail": error.told, "code": error.code}
    detail = []
    for fault in error.faults:
        entry: dict[str, Any] = {"type": fault.kind, "loc": ["body", *fault.loc], "msg": fault.message}
        if fault.shown is not None:
            entry["input"] = fault.shown
        detail.append(entry)
    return {"detail": detail}


def problem(error: HeadraceError, *, openai: bool) -> dict[str, Any]:
    return openai_error(error) if openai else native_error(error)


def problem_answer(error: HeadraceError, *, openai: bool) -> Whole:
    """The response that tells an error."""
    status = status_of(error, openai=openai)
    headers: list[tuple[bytes, bytes]] = []
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.retry_after is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after))).encode()))
    return json_answer(problem(error, openai=openai), status=status, headers=headers)


def routing_answer(status: int, *, openai: bool, path: str, allow: str = "") -> Whole:
    """404 for a path that isn't there, 405 for a method that isn't."""
    if status == 405:
        code, message = "method_not_allowed", f"This path takes {allow}." if allow else "This path doesn't take that method."
    else:
        shown = path if len(path) <= 100 else path[:100] + "…"
        code, message = "not_found", f"There is nothing at {shown}; /docs lists what there is."
    if openai:
        body: dict[str, Any] = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    else:
        body = {"detail": message, "code": code}
    return json_answer(body, status=status, headers=[(b"allow", allow.encode())] if allow else ())


def unexpected() -> HeadraceError:
    """What a client is told of a fault of ours; the log has the rest."""
    return HeadraceError("The server made a mistake. Its log says more, under the id in X-Request-Id.")


def unknown_field(loc: Location) -> UnknownField:
    name = dotted(loc)
    return UnknownField(f"Unknown field `{name}`.", param=name)
