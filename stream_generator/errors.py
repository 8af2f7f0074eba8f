"""Everything that can go wrong, as one small tree. Each message names the remedy."""


class StreamGeneratorError(Exception):
    """Base of all errors that this package raises on purpose."""


class CheckpointError(StreamGeneratorError):
    """The model could not be found, fetched, converted or loaded."""


class InvalidRequest(StreamGeneratorError):
    """The request cannot be served as it stands; `param` names the field to change."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room in the context for even one new token."""


class EngineRefusal(StreamGeneratorError):
    """The request is fine, but the engine takes none at the moment."""


class QueueFull(EngineRefusal):
    """Too many requests are waiting already; try again later."""


class EngineClosed(EngineRefusal):
    """The engine is shutting down, or has failed for good."""


class DuplicateRequest(StreamGeneratorError):
    """A request with this id is still waiting or running."""


class TimeLimitReached(StreamGeneratorError):
    """The request's time was over before its first token."""


class GenerationFailed(StreamGeneratorError):
    """Computing this request's tokens failed; other requests are not affected."""


def first_line(error: BaseException) -> str:
    """What an error of a library says first; its name, if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
