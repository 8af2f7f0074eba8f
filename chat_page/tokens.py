"""The tokens of a reply, with their probabilities and alternatives."""

import math
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field

from chat_page.conversation import Line, Number, Record


class Alternative(NamedTuple):
    """Another token that the model could have chosen, and its probability."""

    text: str
    probability: float


class Token(Record):
    """text: what the token adds to the reply; empty while a character is incomplete."""

    text: Line
    probability: Number
    alternatives: Annotated[tuple[Alternative, ...], Field(max_length=20)] = ()

    @classmethod
    def of(cls, event: dict[str, Any]) -> Self:
        """Read a token from a `delta` event with log-probabilities."""
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
    """The tokens before `index`, then an alternative of that token. Raises `IndexError`."""
    if min(index, choice) < 0:
        raise IndexError
    taken = tokens[index].alternatives[choice]
    return (*tokens[:index], Token(text=taken.text, probability=taken.probability))


def text_of(tokens: tuple[Token, ...]) -> str:
    return "".join(token.text for token in tokens)


def for_view(tokens: tuple[Token, ...]) -> list[dict[str, Any]]:
    """The value of the token view.

    Leaves out alternatives that are only part of a character: no reply can continue from them.
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
