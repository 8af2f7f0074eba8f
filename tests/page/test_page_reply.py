"""A reply on its way to the page: its pace, its end, and its failures."""

import socket
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.fakes import Gate, fake_checkpoint, says
from support.service import RunningService, ServiceFactory
from support.waiting import wait_for

from chat_page.conversation import ChatSettings, Conversation
from chat_page.pace import Batches
from chat_page.reply import Progress, Replies
from chat_page.words import words_for
from stream_service.client import StreamClient
from stream_service.server import Server, bind

WORDS = words_for("en")
TIMEOUT = 20  # seconds; shorter than a gate's, which would end a reply, too


def write(
    service: RunningService | str, conversation: Conversation | None = None, **options: Any
) -> Generator[Progress, None, None]:
    url = service if isinstance(service, str) else service.url
    replies = Replies(StreamClient(url))
    return replies.write(
        replies.open(), conversation or Conversation().asked("hi"), WORDS, **options
    )


@contextmanager
def abort_requested_by(task: Callable[[], object], service: RunningService) -> Iterator[None]:
    """Run `task` in a thread, and begin the block when the open request has `abort_requested`."""
    (request,) = service.engine.requests
    thread = threading.Thread(target=task)
    thread.start()
    wait_for(lambda: request.abort_requested, service.engine)
    yield
    thread.join()


def test_batches_give_the_first_item_at_once_and_later_items_together() -> None:
    begun, more = threading.Semaphore(0), threading.Semaphore(0)

    def items() -> Generator[int, None, None]:
        yield 0
        assert begun.acquire(timeout=TIMEOUT)
        for n in range(1, 5):
            assert more.acquire(timeout=TIMEOUT)
            yield n

    def clock() -> float:
        more.release()  # the next item comes during the wait for the batch
        return 0.0

    batched = iter(Batches(items(), lambda: TIMEOUT, clock))
    assert next(batched) == [0]
    begun.release()
    assert list(batched) == [[1, 2, 3, 4]], "the items ended, not the interval"


def test_a_batch_does_not_wait_for_another_item_after_its_interval() -> None:
    now, more = [0.0], threading.Semaphore(0)

    def items() -> Generator[int, None, None]:
        for n in range(3):
            yield n
            assert more.acquire(timeout=TIMEOUT)

    batched = iter(Batches(items(), lambda: 3600, lambda: now[0]))
    assert next(batched) == [0]
    now[0] = 3601.0  # the interval is over, and only one more item comes
    more.release()
    assert next(batched) == [1]
    more.release()
    more.release()
    now[0] = 9000.0
    assert list(batched) == [[2]]


def test_batches_raise_an_exception_after_the_items_before_it() -> None:
    def items() -> Generator[int, None, None]:
        yield 1
        raise ValueError("broken")

    batched = iter(Batches(items(), lambda: 0))
    received = []
    with pytest.raises(ValueError, match="broken"):
        for batch in batched:
            received += batch
    assert received == [1]


def test_each_delta_reaches_the_page_before_the_next_is_computed(serve: ServiceFactory) -> None:
    gate = Gate(says("abc"))
    growing = write(serve(fake_checkpoint(gate)))
    for n, expected in enumerate(["a", "ab", "abc"], start=1):
        gate.allow()
        progress = next(p for p in growing if p.turn.content == expected)
        assert gate.num_computed_tokens == n
        assert progress.turn.figures is not None
        assert progress.turn.figures.completion_tokens == n
    gate.allow()
    *_, last = growing
    assert last.turn.figures is not None
    assert last.turn.figures.finish_reason == "stop"


def test_the_figures_of_a_reply_come_from_the_service(serve: ServiceFactory) -> None:
    conversation = Conversation().asked("hi").with_settings(ChatSettings(temperature=0.5, seed=3))
    *_, last = write(serve(fake_checkpoint(says("ab"))), conversation, context_length=512)
    figures = last.turn.figures
    assert figures is not None
    assert (figures.model, figures.completion_tokens, figures.context_length) == ("fake", 2, 512)
    assert figures.prompt_tokens == len("user:hi") + 1 + len("assistant:")
    assert figures.params["seed"] == 3
    assert figures.params["temperature"] == 0.5
    assert None not in (figures.queue_ms, figures.ttft_ms, figures.cached_tokens)


def test_a_reply_at_the_end_of_a_conversation_is_continued(serve: ServiceFactory) -> None:
    prompts: list[bytes] = []

    def spy(ids: list[int]) -> int:
        prompts.append(bytes(i for i in ids if i < 256))
        return says("abcd")(ids)

    service = serve(fake_checkpoint(spy))
    conversation = Conversation().asked("hi").with_settings(ChatSettings(max_new_tokens=2))
    *_, first = write(service, conversation)
    assert first.turn.content == "ab"
    assert first.turn.can_go_on
    *_, second = write(service, conversation.replied(first.turn))
    assert second.turn.content == "abcd"
    assert any(prompt.endswith(b"assistant:ab") for prompt in prompts)


def test_the_tokens_of_a_reply_have_alternatives_if_requested(serve: ServiceFactory) -> None:
    service = serve(fake_checkpoint(says("ab")))
    *_, last = write(service, prefix_tokens=())
    assert [token.text for token in last.tokens] == ["a", "b"]
    assert len(last.tokens[0].alternatives) >= 4
    *_, last = write(service)
    assert last.tokens == ()


def test_stop_ends_a_reply_before_its_first_token(serve: ServiceFactory) -> None:
    gate = Gate(says("abc"))
    service = serve(fake_checkpoint(gate))
    replies = Replies(StreamClient(service.url))
    reply_id = replies.open()
    growing = replies.write(reply_id, Conversation().asked("hi"), WORDS)
    next(growing)
    next(growing)  # the service has the request
    assert gate.arrived.acquire(timeout=TIMEOUT)
    with abort_requested_by(lambda: replies.stop(reply_id), service):
        gate.allow(100)
    *_, last = growing
    assert last.turn.figures is not None
    assert last.turn.figures.finish_reason == "abort"
    assert gate.num_computed_tokens <= 1


def test_stop_ends_a_reply_before_its_request_is_sent(serve: ServiceFactory) -> None:
    gate = Gate(says("abc"))
    replies = Replies(StreamClient(serve(fake_checkpoint(gate)).url))
    reply_id = replies.open()
    growing = replies.write(reply_id, Conversation().asked("hi"), WORDS)
    next(growing)
    replies.stop(reply_id)
    *_, last = growing
    assert last.turn.figures is not None
    assert last.turn.figures.finish_reason == "abort"
    assert gate.num_computed_tokens == 0
    replies.stop(reply_id)  # a second call does nothing
    replies.stop(None)


def test_stop_ends_a_reply_even_if_the_service_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hung:
        replies = Replies(StreamClient(f"http://127.0.0.1:{hung.getsockname()[1]}"))
        reply_id = replies.open()
        growing = replies.write(reply_id, Conversation().asked("hi"), WORDS)
        next(growing)
        rest: list[Progress] = []
        reading = threading.Thread(target=lambda: rest.extend(growing))
        reading.start()
        asked, _ = hung.accept()  # the request for the reply, which gets no answer
        stopping = threading.Thread(target=lambda: replies.stop(reply_id))
        stopping.start()
        hung.accept()[0].close()  # the request to stop, which gets none either
        stopping.join()
        reading.join(TIMEOUT)
        assert not reading.is_alive()
        asked.close()
    assert rest[-1].is_last
    assert rest[-1].turn.figures is not None
    assert rest[-1].turn.figures.finish_reason == "abort"


def test_a_reply_over_the_pages_limit_tells_the_visitor_to_try_again(serve: ServiceFactory) -> None:
    gate = Gate(says("abc"))
    replies = Replies(StreamClient(serve(fake_checkpoint(gate)).url), at_once=1)
    first, second = (
        replies.write(replies.open(), Conversation().asked("hi"), WORDS) for _ in range(2)
    )
    next(first)
    *_, last = second
    assert "try again in a moment" in str(last.turn.problem).lower()
    gate.allow(1000)
    assert list(first)[-1].turn.content == "abc"


def test_a_visitor_who_leaves_ends_the_reply(serve: ServiceFactory) -> None:
    gate = Gate(says("a" * 400))
    service = serve(fake_checkpoint(gate))
    growing = write(service)
    gate.allow()
    next(p for p in growing if p.turn.content)
    with abort_requested_by(growing.close, service):
        gate.allow(1000)
    assert gate.num_computed_tokens <= 2


def test_a_failure_is_shown_as_a_sentence_below_the_text_so_far(serve: ServiceFactory) -> None:
    *_, away = write("http://127.0.0.1:9")
    assert away.turn.problem is not None
    assert "Cannot reach the service" in away.turn.problem
    assert "llama3_service.py" in away.turn.problem

    def breaks(ids: list[int]) -> int:
        if bytes(ids[-1:]) == b"b":
            raise RuntimeError
        return says("abc")(ids)

    service = serve(fake_checkpoint(breaks))
    *_, broken = write(service)
    assert broken.turn.content == "ab"
    assert "could not reply" in str(broken.turn.problem)
    assert broken.turn.can_go_on
    *_, rejected = write(service, Conversation().asked("a" * 2000))
    assert "too long for the model's context" in str(rejected.turn.problem)


def test_a_missing_key_and_a_full_queue_have_their_own_sentences(serve: ServiceFactory) -> None:
    from stream_service.settings import ServiceSettings

    checkpoint = fake_checkpoint(says("a"))
    *_, last = write(serve(checkpoint, settings=ServiceSettings(api_keys=("k",))))
    assert "LLAMA3_API_KEY" in str(last.turn.problem)
    gate = Gate(says("abc"))
    service = serve(fake_checkpoint(gate), slots=1, max_waiting=1)
    busy = [write(service) for _ in range(2)]
    for growing in busy:
        next(growing), next(growing)
    *_, last = write(service)
    assert "queue is full" in str(last.turn.problem)
    gate.allow(1000)
    for growing in busy:
        assert list(growing)[-1].turn.content == "abc"


def test_the_page_reports_a_service_that_is_still_loading() -> None:
    server = Server(bind("127.0.0.1", 0), max_body=10_000).start()
    *_, last = write(f"http://127.0.0.1:{server.port}")
    server.close()
    assert "loading" in str(last.turn.problem)
    assert last.turn.content == ""


def test_a_reply_that_is_cut_keeps_its_text_and_can_be_continued(serve: ServiceFactory) -> None:
    from support.answers import DELTA, HEAD, answers, chunk

    start = chunk(
        '{"event":"start","id":"x","model":"m","prompt_tokens":3,"trimmed":{"messages":0}}\n'
    )
    with answers(HEAD + start + DELTA) as url:
        *_, last = write(url)
    assert last.turn.content == "abc"
    assert "connection to the service was lost" in str(last.turn.problem)
    assert last.turn.can_go_on
