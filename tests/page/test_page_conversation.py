"""The page's conversations: their changes, the messages for the service, and their files."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from chat_page import files
from chat_page.conversation import ChatSettings, Conversation, Figures, Turn, name_of
from chat_page.thinking import split_thinking


def reply(text: str, **more: Any) -> Turn:
    return Turn(role="assistant", content=text, **more)


def talk(*pairs: tuple[str, str]) -> Conversation:
    conversation = Conversation()
    for question, answer in pairs:
        conversation = conversation.asked(question).replied(reply(answer))
    return conversation


def contents(conversation: Conversation) -> list[str]:
    return [turn.content for turn in conversation.turns]


def test_changing_a_conversation_makes_a_new_one_and_keeps_the_old_one() -> None:
    before = talk(("a", "b"))
    after = before.asked("c")
    assert contents(before) == ["a", "b"]
    assert contents(after) == ["a", "b", "c"]
    assert after.id == before.id


def test_a_new_reply_replaces_the_last_one() -> None:
    conversation = talk(("a", "b"), ("c", "d"))
    assert contents(conversation.replied(reply("e"))) == ["a", "b", "c", "e"]
    assert contents(conversation.unanswered()) == ["a", "b", "c"]


def test_undo_removes_the_last_message_and_returns_its_text() -> None:
    conversation, message = talk(("a", "b"), ("c", "d")).undone()
    assert (contents(conversation), message) == (["a", "b"], "c")
    assert Conversation().undone()[1] == ""


def test_editing_a_message_removes_all_later_turns() -> None:
    conversation = talk(("a", "b"), ("c", "d"))
    assert contents(conversation.edited(2, "C")) == ["a", "b", "C"]
    edited = conversation.edited(0, "A")
    assert (contents(edited), edited.name) == (["A"], "A"), "the first message gives the name"


def test_a_conversation_is_named_after_its_first_message() -> None:
    assert talk(("Why is  the\nsky blue?", "x"), ("more", "y")).name == "Why is the sky blue?"
    assert name_of("one two three four five six seven eight nine ten eleven twelve") == (
        "one two three four five six seven eight nine…"
    )
    assert name_of("虹" * 60) == "虹" * 48 + "…"


def test_a_failed_reply_is_not_sent_to_the_model() -> None:
    conversation = talk(("a", "b"))
    conversation = conversation.asked("lost").replied(
        reply("", problem="Cannot reach the service.")
    )
    conversation = conversation.asked("c")
    assert conversation.messages() == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]


def test_only_the_continued_reply_is_sent_with_its_thinking() -> None:
    conversation = talk(("a", "<think>hm</think>b"), ("c", "<think>hm</think>d"))
    sent = [message["content"] for message in conversation.messages()]
    assert sent == ["a", "b", "c", "<think>hm</think>d"]


def test_a_system_prompt_is_sent_first_unless_it_is_blank() -> None:
    conversation = talk(("a", "b")).with_settings(ChatSettings(system_prompt="Be brief."))
    assert conversation.messages()[0] == {"role": "system", "content": "Be brief."}
    assert (
        talk(("a", "b")).with_settings(ChatSettings(system_prompt=" ")).messages()[0]["role"]
        == "user"
    )


def test_only_chosen_settings_are_sent() -> None:
    assert ChatSettings().params() == {}
    assert ChatSettings(system_prompt="x", temperature=0, stop=("a",)).params() == {
        "temperature": 0.0,
        "stop": ["a"],
    }


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (reply("x", figures=Figures(finish_reason="length")), True),
        (reply("x", figures=Figures(finish_reason="abort")), True),
        (reply("x", problem="lost", figures=Figures()), True),
        (reply("x", figures=Figures(finish_reason="stop")), False),
        (reply("", figures=Figures(finish_reason="abort")), False),
        (Turn(role="user", content="x"), False),
    ],
)
def test_only_a_reply_that_was_cut_short_can_be_continued(turn: Turn, expected: bool) -> None:
    assert turn.can_go_on is expected


def test_a_loaded_conversation_equals_the_saved_one_but_has_a_new_id() -> None:
    conversation = talk(("a", "b <script>")).with_settings(
        ChatSettings(temperature=0.5, stop=("x",))
    )
    loaded = files.from_json(files.to_json(conversation))
    assert loaded.id != conversation.id
    assert loaded.model_copy(update={"id": conversation.id}) == conversation


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"turns": [{"role": "system", "content": "x"}]}',
        '{"turns": [{"role": "user", "content": 1}]}',
        '{"id": "../../x", "turns": [{"role": "user", "content": "a"}]}',
        '{"version": 2, "turns": [{"role": "user", "content": "a"}]}',
        '{"updated": NaN, "turns": [{"role": "user", "content": "a"}]}',
        json.dumps({"turns": [{"role": "user", "content": "a"}] * 2001}),
        json.dumps({"turns": [{"role": "user", "content": "a" * 1_000_001}]}),
        " " * 4_000_001,
        "[" * 100_000,
    ],
    ids=lambda text: text[:40],
)
def test_a_file_that_is_no_saved_conversation_is_rejected(text: str) -> None:
    with pytest.raises(files.NotAConversation):
        files.from_json(text)


def test_unknown_fields_in_a_saved_conversation_are_ignored() -> None:
    turn = {"role": "user", "content": "a", "mood": "good"}
    assert files.from_json(json.dumps({"turns": [turn], "colour": 1})).turns[0].content == "a"


def test_a_conversation_can_be_saved_as_markdown() -> None:
    conversation = talk(("a", "b")).with_settings(ChatSettings(system_prompt="p"))
    assert files.to_markdown(conversation) == (
        "# a\n\n## System\n\np\n\n## User\n\na\n\n## Assistant\n\nb\n"
    )


def test_a_saved_file_gets_a_name_that_every_system_allows() -> None:
    conversation = Conversation(name="../ What: is/this? 彩虹 ")
    assert files.file_name(conversation, "md") == "What-is-this-彩虹.md"
    assert files.file_name(Conversation(), "json") == "conversation.json"


def test_chat_settings_reject_nan() -> None:
    with pytest.raises(ValidationError):
        ChatSettings(temperature=float("nan"))


@pytest.mark.parametrize(
    ("text", "thought", "answer", "is_open"),
    [
        ("no thought", "", "no thought", False),
        ("<think>\na\n</think>\n\nb", "a", "b", False),
        ("\n<think>a", "a", "", True),
        ("[THINK]a[/THINK]b", "a", "b", False),
        ("a\n</think>\n\nb", "a", "b", False),
        ("It ends with `</think>`.", "", "It ends with `</think>`.", False),
        ("Write <think>x</think>.", "", "Write <think>x</think>.", False),
    ],
)
def test_split_thinking_separates_the_thinking_from_the_answer(
    text: str, thought: str, answer: str, is_open: bool
) -> None:
    assert split_thinking(text) == (thought, answer, is_open)
