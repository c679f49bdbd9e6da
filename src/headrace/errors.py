"""The error tree. Each class knows its HTTP status, its code, and whether trying again helps.

    HeadraceError                     500 internal_error
    ├── BadRequest                    400 invalid_request
    │   ├── InvalidParameter          400 invalid_parameter        (param)
    │   ├── UnknownField              400 unknown_field            (param)
    │   ├── Unsupported               400 unsupported              (param)
    │   ├── ContentRefused            400 content_filter
    │   └── ContextLengthExceeded     400 context_length_exceeded
    │       └── TooManyTokens         (within the API process only; `prepare` makes it a ContextLengthExceeded)
    ├── Unauthorized                  401 invalid_api_key
    ├── Forbidden                     403 forbidden
    ├── NotFound                      404 not_found
    │   └── ModelNotFound             404 model_not_found
    ├── BodyTooLarge                  413 body_too_large
    ├── ConfigRefused                 422 config_refused           a reload whose configuration isn't taken
    ├── RequestQuarantined            422 request_quarantined      the engine dies of this request
    ├── RateLimited                   429 rate_limited             (retry)
    │   └── QueueShareFull            429 queue_share_full         the tenant fills its share of the queue
    ├── RequestFailed                 500 request_failed           this request alone broke in the engine
    ├── EngineDied                    502 engine_died              (retry)
    ├── UpstreamError                 502 upstream_error           (retry)
    ├── Overloaded                    503 overloaded               (retry)
    │   └── NotAdmitted               503 not_admitted             by the queue before an engine:
    │       ├── QueueFull             503 queue_full
    │       ├── WaitTooLong           503 wait_too_long
    │       ├── DeadlineUnmeetable    503 deadline_unmeetable
    │       └── Shed                  503 shed                     it waited, and gave its place up to another
    ├── ModelRefused                  409 model_refused            a model isn't loaded, unloaded, promoted or rolled back
    ├── EngineUnavailable             503 engine_unavailable       (retry)
    │   ├── CircuitOpen               503 circuit_open             (retry)
    │   ├── ModelNotLoaded            503 model_not_loaded         (retry) there is no room for it now, or it can't be fetched
    │   └── ModelTooLarge             503 model_too_large          it never fits
    ├── StoreUnavailable              503 store_unavailable        (retry)
    ├── DeadlineExceeded              504 deadline_exceeded
    ├── ConfigError                   the start is refused
    └── ModelError                    a model can't be found, fetched, converted or served

Errors cross the socket from a worker as (code, message, param, retry_after) and are revived by `revive`.
"""

from __future__ import annotations

from typing import ClassVar


class HeadraceError(Exception):
    """Base of every error that is meant for a person to read.

    `message` says what is wrong and what to do. `param` names the request field at fault. `retry_after` is
    seconds, for a `Retry-After` header.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retry: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @property
    def told(self) -> str:
        """What callers are told; `message` is for the operator, too."""
        return self.message


class BadRequest(HeadraceError):
    status = 400
    code = "invalid_request"


class InvalidParameter(BadRequest):
    code = "invalid_parameter"


class UnknownField(BadRequest):
    code = "unknown_field"


class Unsupported(BadRequest):
    """The field is known, but this server, engine or model can't honour it."""

    code = "unsupported"


class ContentRefused(BadRequest):
    """The operator's filter refuses the prompt."""

    code = "content_filter"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class TooManyTokens(ContextLengthExceeded):
    """Counting stopped early, at `at_least` tokens."""

    code = "too_many_tokens"

    def __init__(self, at_least: int) -> None:
        super().__init__(f"The text has at least {at_least} tokens.")
        self.at_least = at_least


class Unauthorized(HeadraceError):
    status = 401
    code = "invalid_api_key"


class Forbidden(HeadraceError):
    status = 403
    code = "forbidden"


class NotFound(HeadraceError):
    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class BodyTooLarge(HeadraceError):
    status = 413
    code = "body_too_large"


class ConfigRefused(HeadraceError):
    """A new configuration isn't taken; the old one stays in force, whole."""

    status = 422
    code = "config_refused"


class ModelRefused(HeadraceError):
    """What an administrator wants of a model isn't done; nothing has changed."""

    status = 409
    code = "model_refused"


class RequestQuarantined(HeadraceError):
    """The engine's process died of this request, when it ran alone; until the quarantine is over it isn't tried again."""

    status = 422
    code = "request_quarantined"


class RateLimited(HeadraceError):
    """`limit`: what ran out (`requests`, `tokens`, `concurrency`, `budget`), and whose it is (`key`, `tenant`, `address`).

    None where it is an upstream's limit.
    """

    status = 429
    code = "rate_limited"
    retry = True
    limit: tuple[str, str] | None = None


class QueueShareFull(RateLimited):
    """The queue is full, and as much of it as is its tenant's due holds the tenant's own requests."""

    code = "queue_share_full"


class RequestFailed(HeadraceError):
    code = "request_failed"


class EngineDied(HeadraceError):
    status = 502
    code = "engine_died"
    retry = True


class UpstreamError(HeadraceError):
    status = 502
    code = "upstream_error"
    retry = True


class Overloaded(HeadraceError):
    status = 503
    code = "overloaded"
    retry = True


class NotAdmitted(Overloaded):
    """The engine works, and has too much to do. Nothing was generated."""

    code = "not_admitted"


class QueueFull(NotAdmitted):
    code = "queue_full"


class WaitTooLong(NotAdmitted):
    code = "wait_too_long"


class DeadlineUnmeetable(NotAdmitted):
    """Known beforehand; a request whose time runs out later ends with `DeadlineExceeded`."""

    code = "deadline_unmeetable"


class Shed(NotAdmitted):
    """A request that waited made room for a more important one, or for a tenant that has fewer waiting; or it waited for too long."""

    code = "shed"


class EngineUnavailable(HeadraceError):
    """`leaving`: the server itself ends what runs, because it stops; nothing is wrong with the engine."""

    status = 503
    code = "engine_unavailable"
    retry = True
    leaving: bool = False


class CircuitOpen(EngineUnavailable):
    """The engine failed too often of late, and is left alone for a while."""

    code = "circuit_open"


class ModelNotLoaded(EngineUnavailable):
    """One of several models, that can't be brought to memory now."""

    code = "model_not_loaded"


class ModelTooLarge(EngineUnavailable):
    """It needs more memory than all models together may take."""

    code = "model_too_large"
    retry = False


class StoreUnavailable(HeadraceError):
    """The database or the shared state that the request needs can't be reached."""

    status = 503
    code = "store_unavailable"
    retry = True

    def __init__(self, message: str, *, told: str | None = None, param: str | None = None, retry_after: float | None = None) -> None:
        """`told` is for callers, where `message` names hosts and folders that are none of their business."""
        super().__init__(message, param=param, retry_after=retry_after)
        self._told = told

    @property
    def told(self) -> str:
        return self._told or self.message


class DeadlineExceeded(HeadraceError):
    status = 504
    code = "deadline_exceeded"


class ConfigError(HeadraceError):
    """Says which file and which key, and the nearest right name."""

    code = "config_error"


class ModelError(HeadraceError):
    code = "model_error"


def _tree(root: type[HeadraceError]) -> dict[str, type[HeadraceError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        if child is not TooManyTokens:
            found |= _tree(child)
    return found


_BY_CODE = _tree(HeadraceError)
"""The classes of this module. Those that other modules derive stay in their process, and share codes with these."""


def revive(code: str, message: str, param: str | None = None, retry_after: float | None = None) -> HeadraceError:
    """The error that a worker sent, as the class it was raised with; an unknown code is a `HeadraceError`."""
    return _BY_CODE.get(code, HeadraceError)(message, param=param, retry_after=retry_after)
