"""Those who have left are noticed once, and the others not at all."""

import threading

from support.waiting import wait_for

from stream_service.disconnect import DisconnectWatcher


def test_only_those_who_left_are_called_back_and_only_once() -> None:
    watcher = DisconnectWatcher(interval=0.001)
    calls: list[str] = []
    left, asked_again = threading.Event(), threading.Semaphore(0)
    called = threading.Event()

    def stays() -> bool:
        asked_again.release()
        return False

    def leave(name: str) -> None:
        calls.append(name)
        called.set()

    watcher.watch(stays, lambda: leave("stays"))
    watcher.watch(left.is_set, lambda: leave("leaver"))
    unwatch = watcher.watch(left.is_set, lambda: leave("unwatched"))
    unwatch()
    unwatch()
    left.set()
    wait_for(called)
    for _ in range(5):  # several rounds later
        wait_for(asked_again)
    assert calls == ["leaver"]


def test_one_that_raises_does_not_end_the_watch() -> None:
    watcher = DisconnectWatcher(interval=0.001)
    called = threading.Event()

    def broken() -> bool:
        raise OSError

    watcher.watch(broken, lambda: None)
    watcher.watch(lambda: True, called.set)
    wait_for(called)
