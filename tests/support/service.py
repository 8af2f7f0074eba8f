"""The real service, with a model that the test chooses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from support.engines import engine_of
from support.waiting import wait_for

from stream_generator.engine.engine import Engine
from stream_generator.errors import QueueFull
from stream_generator.loaded_model import Checkpoint
from stream_generator.request import Request


@dataclass
class RunningService:
    """A service on its own port, and its engine."""

    url: str
    engine: Engine
    app: Any

    def request(self, request_id: str) -> Request:
        """Wait until the engine has the request with this id, and return it."""

        def found() -> Request | None:
            return next((r for r in self.engine.requests if r.id == request_id), None)

        wait_for(found, self.engine)
        request = found()
        assert request is not None, "the request has ended"
        return request

    def wait_for_abort(self, request: Request) -> None:
        """Wait until a request is told to abort."""
        wait_for(lambda: request.abort_requested, self.engine)

    @property
    def has_no_open_request(self) -> bool:
        """Whether no request is open."""
        dispatcher = self.app.extensions["dispatcher"]
        return free_places(dispatcher) == dispatcher.limit


def free_places(dispatcher: Any) -> int:
    """Count the requests that a dispatcher accepts now, by admitting and releasing them."""
    admitted: list[Any] = []
    with suppress(QueueFull):
        while True:
            admitted.append(dispatcher.admit(f"place {len(admitted)}", None))
    for admission in admitted:
        admission.release()
    return len(admitted)


ServiceFactory = Callable[..., RunningService]


@contextmanager
def running_service(
    checkpoint: Checkpoint, *, max_waiting: int = 8, slots: int | None = 8, settings: Any = None
) -> Iterator[RunningService]:
    """Run the real server on a free port until the block ends."""
    # Imported here, so that the tests of `stream_generator` run without Flask.
    from stream_service.app import create_app
    from stream_service.server import Server, bind
    from stream_service.settings import ServiceSettings

    settings = settings or ServiceSettings()
    engine = engine_of(checkpoint, max_waiting=max_waiting, slots=slots).start()
    server = Server(bind("127.0.0.1", 0), max_body=settings.max_body).start()
    app = create_app(engine, settings)
    server.open(app, max_open=engine.intake.requests)
    try:
        yield RunningService(f"http://127.0.0.1:{server.port}", engine, app)
    finally:
        engine.close()
        server.close()
