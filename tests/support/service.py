"""The real service on a model of the test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from support.engines import engine_of

from stream_generator.engine.engine import Engine
from stream_generator.loaded_model import Checkpoint


@dataclass
class RunningService:
    """A service on a port of its own, with the engine behind it."""

    url: str
    engine: Engine
    app: Any


ServiceFactory = Callable[..., RunningService]


@contextmanager
def running_service(
    checkpoint: Checkpoint, *, max_waiting: int = 8, slots: int | None = 8, settings: Any = None
) -> Iterator[RunningService]:
    """The real server on a free port, for as long as the block lasts."""
    # Imported here, so that the tests of `stream_generator` run where there is no Flask.
    from stream_service.app import create_app
    from stream_service.server import Server, bind
    from stream_service.settings import Settings

    settings = settings or Settings()
    engine = engine_of(checkpoint, max_waiting=max_waiting, slots=slots).start()
    server = Server(bind("127.0.0.1", 0), max_body=settings.max_body).start()
    app = create_app(engine, settings)
    server.open(app, max_open=engine.intake.requests)
    try:
        yield RunningService(f"http://127.0.0.1:{server.port}", engine, app)
    finally:
        engine.close()
        server.close()
