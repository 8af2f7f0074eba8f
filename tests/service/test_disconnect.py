"""`DisconnectWatcher` calls back once for each client that has left."""

import threading

from support.waiting import wait_for

from stream_service.disconnect import DisconnectWatcher


def test_the_watcher_calls_back_once_and_only_for_clients_that_left() -> None:
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
    watcher.watch(left.is_set, lambda: leave("leaves"))
    unwatch = watcher.watch(left.is_set, lambda: leave("unwatched"))
    unwatch()
    unwatch()
    left.set()
    wait_for(called)
    for _ in range(5):  # give the watcher several more rounds
        wait_for(asked_again)
    assert calls == ["leaves"]


def test_a_check_that_raises_does_not_end_the_watcher() -> None:
    watcher = DisconnectWatcher(interval=0.001)
    called = threading.Event()

    def broken() -> bool:
        raise OSError

    watcher.watch(broken, lambda: None)
    watcher.watch(lambda: True, called.set)
    wait_for(called)
