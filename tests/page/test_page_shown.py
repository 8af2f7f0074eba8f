"""What the page shows of a conversation: text without HTML, figures, tokens, both languages."""

import re
from string import Formatter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_page_conversation import reply, talk

from chat_page.conversation import Conversation, Figures, Turn
from chat_page.markup import MARK, marked, unmarked
from chat_page.meter import meter
from chat_page.reply import Progress
from chat_page.tokens import Token, branch, for_view, text_of
from chat_page.transcript import in_progress, transcript, turn_at
from chat_page.words import PRESETS, TEXTS, i18n, words_for

WORDS = words_for("en")
M = MARK


def texts(messages: list[dict[str, object]]) -> list[str]:
    return [part["text"] for message in messages for part in message["content"]]  # type: ignore


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <b>x</b>", f"a <{M}b>x<{M}/b>"),
        ("<!-- x --><?php", f"<{M}!-- x --><{M}?php"),
        ("1 < 2 <- 3", "1 < 2 <- 3"),
        ("`<b>` and ``<i> ` <u>``", "`<b>` and ``<i> ` <u>``"),
        ("`a\n<b>`", f"`a\n<{M}b>`"),
        ("| `a | <b>` |", f"| `a | <{M}b>` |"),
        (r"\`<b>`", rf"\`<{M}b>`"),
        ("![x](http://a/b.png)", f"!{M}[x](http://a/b.png)"),
        ("<https://a.b/c>", "<https://a.b/c>"),
        ("```html\n<b>\n```\n<b>", f"```html\n<b>\n```\n<{M}b>"),
        ("~~~\n```\n<b>\n~~~\n<b>", f"~~~\n```\n<b>\n~~~\n<{M}b>"),
        ("```\n<b>", "```\n<b>"),
        ("- ```\n  x\n  ```\n  <b>", f"- ```\n  x\n  ```\n  <{M}b>"),
        ("  ```\n```\n<b>", f"  ```\n```\n<{M}b>"),
        ("```mermaid\ngraph\n```", f"```{M}mermaid\ngraph\n```"),
        ("\r```\r<b>\r```\r<b>", f"\n```\n<b>\n```\n<{M}b>"),
    ],
)
def test_html_is_marked_as_text_unless_it_is_certainly_code(text: str, expected: str) -> None:
    assert marked(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$x^2$ and $$y$$", f"{M}$x^2${M} and {M}$$y$${M}"),
        (r"\(a\) \[b" + "\n" + r"c\]", rf"{M}\(a\){M} {M}\[b" + "\n" + rf"c\]{M}"),
        ("it costs $5 or $6", "it costs $5 or $6"),
        ("US$5, A$6", "US$5, A$6"),
        ("`$x$`", "`$x$`"),
        ("```sh\necho $A $B\n```", "```sh\necho $A $B\n```"),
        ("$a<b$", f"{M}$a<b${M}"),
        ("$$ not yet", "$$ not yet"),
    ],
)
def test_formulas_are_marked_and_prices_are_not(text: str, expected: str) -> None:
    assert marked(text) == expected


@given(st.text(alphabet=st.sampled_from("<>!$`~|\\[]()/ab 1\n" + MARK)))
def test_marks_disable_html_and_change_nothing_else(text: str) -> None:
    shown = marked(text)
    assert unmarked(shown) == unmarked(text)
    if "`" not in text and "~" not in text and "\\" not in text and "$" not in text:
        assert not re.search(r"<[A-Za-z/!]", shown)
        assert "![" not in shown


def test_a_reply_is_shown_as_thought_answer_problem_and_figures() -> None:
    figures = Figures(prompt_tokens=5, finish_reason="length", completion_tokens=2)
    turn = reply("<think>hm</think>so <b>", problem="It <broke>.", figures=figures)
    user, thought, answer, problem, line = transcript(
        Conversation().asked("a<i>").replied(turn), WORDS
    )
    assert texts([user, thought, answer]) == [f"a<{M}i>", "hm", f"so <{M}b>"]
    assert thought["metadata"] == {"title": "Thoughts", "status": "done"}
    assert "It &lt;broke&gt;." in texts([problem])[0]
    assert "reached the length limit" in texts([line])[0]
    assert [way["value"] for way in line["options"]] == ["go_on", "again"]


def test_a_missing_reply_can_be_requested_again_and_a_finished_one_cannot() -> None:
    finished = reply("x", figures=Figures(finish_reason="stop"))
    assert "options" not in transcript(Conversation().asked("a").replied(finished), WORDS)[-1]
    message, missing = transcript(Conversation().asked("a"), WORDS)
    assert "options" not in message, "Gradio shows none below a visitor's message"
    assert [way["value"] for way in missing["options"]] == ["again"]


def test_every_message_on_the_page_maps_to_its_turn() -> None:
    conversation = talk(("a", "<think>x</think>b"), ("c", "d"))
    shown = texts(transcript(conversation, WORDS))
    assert shown == ["a", "x", "b", "c", "d"]
    assert [turn_at(conversation, i, WORDS) for i in range(5)] == [0, 1, 1, 2, 3]
    with pytest.raises(IndexError):
        turn_at(conversation, 5, WORDS)


@pytest.mark.parametrize(
    ("figures", "position", "expected"),
    [
        (Figures(), None, "Contacting the service"),
        (Figures(prompt_tokens=9), 3, "Position 3 in the queue"),
        (Figures(prompt_tokens=9), None, "Reading 9 prompt tokens"),
        (Figures(prompt_tokens=9, completion_tokens=1), None, "9 prompt tokens"),
        (Figures(finish_reason="abort"), None, "stopped"),
    ],
)
def test_the_meter_shows_the_progress_of_a_reply(
    figures: Figures, position: int | None, expected: str
) -> None:
    turn = Turn(role="assistant", content="", figures=figures)
    (line,) = texts(in_progress(Progress(turn, position), WORDS))
    assert expected in line


def test_the_meter_of_a_finished_reply_shows_all_figures() -> None:
    figures = Figures(
        model="m<1>", prompt_tokens=40, cached_tokens=32, completion_tokens=10,
        context_length=100, trimmed_messages=2, ttft_ms=81.4, tokens_per_second=35.26,
        finish_reason="stop", params={"temperature": 0.6, "seed": 7, "stop": ["<x>"]},
    )  # fmt: skip
    line = meter(figures, WORDS)
    text = re.sub(r"<[^>]*>", "|", line)
    for part in (
        "40 prompt tokens · 32 from the cache", "first token after 81 ms", "10 tokens",
        "35.3 tokens/s", "earlier messages left out: 2", "complete", "context 50 of 100",
        "temperature", "0.6", "seed", "7",
    ):  # fmt: skip
        assert part in text
    assert "width:50.0%" in line
    assert "m&lt;1&gt;" in line
    assert "&lt;x&gt;" in line


def test_a_branch_keeps_the_earlier_tokens_and_takes_the_alternative() -> None:
    event = {
        "delta": " cat", "id": 1, "token": " cat", "logprob": -0.5,
        "alternatives": [
            {"id": 1, "token": " cat", "logprob": -0.5},
            {"id": 2, "token": " dog", "logprob": -1.5},
            {"id": 3, "token": "\ufffd", "logprob": -2.5},
        ],
    }  # fmt: skip
    tokens = (Token(text="A", probability=1), Token.of(event), Token(text="!", probability=1))
    assert text_of(branch(tokens, 1, 0)) == "A dog"
    (shown,) = for_view(tokens[1:2])
    assert shown["probability"] == 0.6065
    assert shown["alternatives"] == [{"text": " dog", "probability": 0.2231, "choice": 0}]
    for index, choice in ((9, 0), (-1, 0), (1, 9), (1, -1)):
        with pytest.raises(IndexError):
            branch(tokens, index, choice)


def test_every_text_of_the_page_exists_in_both_languages() -> None:
    for key, (english, chinese) in TEXTS.items():
        placeholders = [
            {name for _, name, _, _ in Formatter().parse(t) if name} for t in (english, chinese)
        ]
        assert placeholders[0] == placeholders[1], key
        assert re.search("[\u4e00-\u9fff]", chinese) or key in ("top_p", "top_k", "min_p"), key
    assert all(key in TEXTS for key in PRESETS)
    assert set(i18n.translations) >= {"en", "zh", "zh-CN"}
