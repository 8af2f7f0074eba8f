"""The tree of all errors of this package. Each message gives the remedy."""


class StreamGeneratorError(Exception):
    """Base class of the errors that this package raises."""


class CheckpointError(StreamGeneratorError):
    """The model could not be found, downloaded, converted or loaded."""


class InvalidRequest(StreamGeneratorError):
    """The request can never be served; `param` names the field to change."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room in the context for a new token."""


class EngineRejection(StreamGeneratorError):
    """The request is valid, but the engine accepts no requests now."""


class QueueFull(EngineRejection):
    """Too many requests are waiting; try again later."""


class EngineClosed(EngineRejection):
    """The engine is shutting down, or has failed and must be restarted."""


class DuplicateRequest(StreamGeneratorError):
    """A request with this id is still waiting or running."""


class TimeLimitReached(StreamGeneratorError):
    """The request's time limit passed before its first token."""


class GenerationFailed(StreamGeneratorError):
    """Computing this request's tokens failed; other requests are not affected."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the error's class name if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
