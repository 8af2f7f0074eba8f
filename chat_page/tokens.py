"""A reply token by token: how likely each was, and what else might have stood there."""

import math
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field

from chat_page.conversation import Line, Number, Record


class Alternative(NamedTuple):
    """Another token, and its probability."""

    text: str
    probability: float


class Token(Record):
    """text: what it added to the reply; empty while a character is incomplete."""

    text: Line
    probability: Number
    alternatives: Annotated[tuple[Alternative, ...], Field(max_length=20)] = ()

    @classmethod
    def of(cls, event: dict[str, Any]) -> Self:
        """Out of a `delta` event with log-probabilities."""
        others = [
            Alternative(other["token"], math.exp(other["logprob"]))
            for other in event["alternatives"]
            if other["id"] != event["id"]
        ]
        return cls(
            text=event["delta"],
            probability=math.exp(event["logprob"]),
            alternatives=tuple(others),
        )


def branch(tokens: tuple[Token, ...], index: int, choice: int) -> tuple[Token, ...]:
    """The tokens before `index`, and that one's alternative in its place. Raises `IndexError`."""
    if min(index, choice) < 0:
        raise IndexError
    taken = tokens[index].alternatives[choice]
    return (*tokens[:index], Token(text=taken.text, probability=taken.probability))


def text_of(tokens: tuple[Token, ...]) -> str:
    return "".join(token.text for token in tokens)


def for_view(tokens: tuple[Token, ...]) -> list[dict[str, Any]]:
    """What the page's script draws: it sets text, never HTML.

    An alternative that is a part of a character cannot be gone on from, and is left out.
    """
    return [
        {
            "text": token.text,
            "probability": round(token.probability, 4),
            "alternatives": [
                {"text": other.text, "probability": round(other.probability, 4), "choice": choice}
                for choice, other in enumerate(token.alternatives)
                if other.text and "\ufffd" not in other.text
            ],
        }
        for token in tokens
    ]
