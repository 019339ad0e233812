"""Every error that weft raises on purpose, and the HTTP status it becomes.

WeftError                    500
├── ConfigError              (start-up) a flag, a variable or a file that cannot be honoured
├── CheckpointError          (start-up) a model folder that cannot be served
├── DeviceError              (start-up or run time) the device cannot do what was asked of it
│   └── RankLost             500  a tensor-parallel rank has ended, hangs, or does something else than the others
├── StepFailed               500  a step died under the request
├── InvalidRequest           400  a field with a value that cannot be honoured
│   ├── ContextTooLong       400  prompt and output do not fit the model's context
│   └── NeverFits            400  the request needs more blocks than the pool has
├── Unauthorized             401
├── NotFound                 404
├── BodyTooSlow              408
├── BodyTooLarge             413
├── UnsupportedMedia         415  a body that does not call itself JSON
├── QueueFull                429  with Retry-After
└── Unavailable              503  draining, not ready, or the engine is dead
"""

from __future__ import annotations


class WeftError(Exception):
    """Base of the tree. `status` is the HTTP status, `type` and `code` are OpenAI's error fields."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(WeftError):
    code = "invalid_configuration"


class CheckpointError(WeftError):
    code = "invalid_checkpoint"


class DeviceError(WeftError):
    code = "device_error"


class RankLost(DeviceError):
    code = "rank_lost"


class StepFailed(WeftError):
    code = "step_failed"


class InvalidRequest(WeftError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class NeverFits(InvalidRequest):
    code = "request_too_large"


class Unauthorized(WeftError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFound(WeftError):
    status = 404
    type = "not_found_error"
    code = "not_found"


class BodyTooSlow(WeftError):
    status = 408
    type = "invalid_request_error"
    code = "body_too_slow"


class BodyTooLarge(WeftError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class UnsupportedMedia(WeftError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class QueueFull(WeftError):
    """The bounded queue is full; `retry_after` is a number of whole seconds."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(WeftError):
    status = 503
    type = "unavailable_error"
    code = "unavailable"


def by_code(code: str | None) -> type[WeftError]:
    """The class whose `code` crossed a process boundary; `WeftError` when no class has it."""
    pending: list[type[WeftError]] = [WeftError]
    while pending:
        candidate = pending.pop()
        if candidate.code == code:
            return candidate
        pending.extend(candidate.__subclasses__())
    return WeftError
