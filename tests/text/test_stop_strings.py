"""No part of a stop string reaches the reader, wherever deltas split it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from stream_generator.text.stop_strings import StopStrings

stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def run(stop_list: list[str], deltas: list[str]) -> tuple[str, bool]:
    """The text that a reader gets, and whether a stop string ended it."""
    matcher, shown = StopStrings(stop_list), ""
    for delta in deltas:
        text, stopped = matcher.feed(delta)
        shown += text
        if stopped:
            return shown, True
    return shown + matcher.flush(), False


def expected(stop_list: list[str], text: str) -> tuple[str, bool]:
    """Cut before the stop string that ends first; of several, before the longest one."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop_list if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(stops, st.lists(st.text("abcd", max_size=5), max_size=12))
@settings(deadline=None, max_examples=1000)
def test_stop_strings_are_found_however_deltas_split_the_text(
    stop_list: list[str], deltas: list[str]
) -> None:
    assert run(stop_list, deltas) == expected(stop_list, "".join(deltas))


@given(stops, st.text("abcd", max_size=40))
@settings(deadline=None, max_examples=500)
def test_no_part_of_a_stop_string_is_ever_shown(stop_list: list[str], text: str) -> None:
    final, _ = expected(stop_list, text)
    matcher, shown = StopStrings(stop_list), ""
    for character in text:
        delta, stopped = matcher.feed(character)
        shown += delta
        assert final.startswith(shown)
        if stopped:
            break


def test_text_that_only_begins_like_a_stop_string_is_delivered() -> None:
    assert run(["STOP"], ["a ST", "O", "P"]) == ("a ", True)
    assert run(["STOP"], ["a ST", "O", " b"]) == ("a STO b", False)
    assert run(["STOP"], ["a STO"]) == ("a STO", False)
