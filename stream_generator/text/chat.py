"""Messages to prompt ids: the checkpoint's own chat template, and no way to forge a turn."""

import bisect
import contextlib
import functools
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypedDict

from jinja2 import Environment, TemplateSyntaxError, nodes

from stream_generator.errors import CheckpointError, InvalidRequest

# Private-use characters: no script needs them, and templates pass them through untouched.
_PRIVATE_USE = range(0xE000, 0xF8FF)


# Of lines of a template, as it is compiled to Python, a prompt of a few words runs some hundreds.
MOST_LINES, MOST_CHARACTERS = 100_000, 1_000_000
LARGEST_FACTOR = 10_000  # that a template may multiply with: one operation can take without end
TEMPLATE_FILE = "<template>"  # where Jinja says that its compiled code comes from
ENDLESS = (
    "the checkpoint's chat template does not come to an end; take it from the model's own page, or "
    "remove it (chat_template.jinja, or chat_template in tokenizer_config.json)"
)


class _TooLong(BaseException):
    """Not an `Exception`, which a template's are taken for."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True)
class Prompt:
    """Prompt ids, and how much of the conversation they leave out."""

    ids: list[int]
    trimmed_messages: int = 0
    trimmed_tokens: int = 0


class ChatFormat:
    """Renders conversations with the chat template that came with the checkpoint.

    An ordinary conversation gets exactly the ids of `tokenizer.apply_chat_template`. One whose
    text contains the name of a control token (say `<|eot_id|>`) gets that name as plain text, so
    that nobody can end a turn, or begin one, from inside a message.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        added = list(tokenizer.added_tokens_decoder.values())
        template = str(tokenizer.chat_template or "")
        self._special = {token.content: token for token in added if token.special}
        # Some checkpoints do not flag their turn tokens as special; the template gives them away.
        flagged_nowhere = [
            token.content
            for token in added
            if not token.special and token.content in template and not token.content.isspace()
        ]
        self._special_pattern = _any_of(self._special)
        self._control_pattern = _any_of([*self._special, *flagged_nowhere])

    @property
    def can_chat(self) -> bool:
        """Whether there is a format at all: base models have none."""
        return bool(self._tokenizer.chat_template)

    def describe(self) -> str:
        """Where the format came from, for a person."""
        return "the checkpoint's own" if self.can_chat else "none, so it can only continue texts"

    def fit(self, messages: list[Message], context_length: int) -> Prompt:
        """The prompt of `messages`, without the oldest turns where the context would be too full.

        An eighth of the context at least is left for the reply. System messages at the beginning
        stay, and so does the last turn, whatever its length. What goes, goes by quarters of the
        context: so the turns of a growing conversation begin alike until another quarter must go,
        and what is computed of the one serves the next. Raises as `encode` does.
        """
        ids = self.encode(messages)
        excess = len(ids) - context_length * 7 // 8
        head = next((n for n, m in enumerate(messages) if m["role"] != "system"), len(messages))
        starts = [n for n, m in enumerate(messages) if m["role"] == "user" and n > head]
        if excess <= 0 or not starts:
            return Prompt(ids)
        quarter = max(context_length // 4, 1)
        goal = len(ids) - math.ceil(excess / quarter) * quarter

        @functools.cache
        def without(start: int) -> list[int]:
            return self.encode(messages[:head] + messages[start:])

        first = bisect.bisect_left(starts, True, key=lambda start: len(without(start)) <= goal)
        start = starts[min(first, len(starts) - 1)]
        kept = without(start)
        return Prompt(kept, start - head, len(ids) - len(kept))

    def encode(self, messages: list[Message]) -> list[int]:
        """The prompt ids of `messages`, ready for the assistant's reply.

        A conversation that ends in an assistant turn is continued: the prompt ends inside it.
        Raises `InvalidRequest` if there is no template, or the template refuses the messages.
        """
        if not self.can_chat:
            raise InvalidRequest(
                "this is a base model: it has no chat template, and can only continue a text "
                "(/v1/completions); to chat, serve an instruct model",
                param="messages",
            )
        patterns = [(self._pattern_for(message), message["content"]) for message in messages]
        if not any(pattern and pattern.search(content) for pattern, content in patterns):
            ids: list[int] = self._apply_template(messages, tokenize=True)
            return ids
        return self._encode_guarded(messages)

    def check_template(self) -> None:
        """Try the template on a few conversations, before anybody's request waits for it.

        Raises `CheckpointError` where it goes on without end, or makes a book of a few words. One
        that refuses them (some take no system message) may still take others.
        """
        _refuse_large_operations(str(self._tokenizer.chat_template or ""))
        turns: list[Message] = [
            {"role": role, "content": "Hello."} for role in ("system", "user", "assistant", "user")
        ]
        long = [*turns, *turns[2:] * 20]
        for messages in ([turns[1]], turns[:2], turns[1:3], turns, long):
            with contextlib.suppress(InvalidRequest), _at_most(MOST_LINES):
                if len(self._apply_template(messages, tokenize=False)) > MOST_CHARACTERS:
                    raise CheckpointError(ENDLESS)

    def _pattern_for(self, message: Message) -> re.Pattern[str] | None:
        """What must not be read in a message. A reply's own <think> is its template's business."""
        assistant = message["role"] == "assistant"
        return self._special_pattern if assistant else self._control_pattern

    def _encode_guarded(self, messages: list[Message]) -> list[int]:
        """Break control tokens inside messages by a marker, render, and encode piece by piece."""
        plain, split = _unused_characters("".join(m["content"] for m in messages))

        def break_up(match: re.Match[str]) -> str:
            name = match.group()
            return name[0] + (plain if name in self._special else split) + name[1:]

        broken: list[Message] = []
        for message in messages:
            pattern = self._pattern_for(message)
            content = message["content"]
            broken.append(
                {**message, "content": pattern.sub(break_up, content) if pattern else content}
            )
        rendered: str = self._apply_template(broken, tokenize=False)
        ids: list[int] = []
        after = None  # the control token before the piece at hand
        for piece in _split_keeping(rendered, self._special_pattern):
            token = self._special.get(piece)
            if token is not None:
                ids.append(self._tokenizer.convert_tokens_to_ids(piece))
            else:
                # What the tokenizer itself would strip around such a token.
                text = piece.lstrip() if after is not None and after.rstrip else piece
                # Unflagged tokens would still be matched in plain text: encode their halves apart.
                for part in text.replace(plain, "").split(split):
                    ids += self._encode_plain(part)
            after = token
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        return ids

    def _apply_template(self, messages: list[Message], *, tokenize: bool) -> Any:
        continues = bool(messages) and messages[-1]["role"] == "assistant"
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tokenize=tokenize,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                return_dict=False,
            )
        except Exception as error:  # whatever the checkpoint's own program raises
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error


class MetaChatFormat(ChatFormat):
    """Llama 3's own format, for Meta's layout, which has no template.

    Each piece of text is encoded by itself, and as plain text. Source: Meta's llama-models,
    llama3/chat_format.py.
    """

    @property
    def can_chat(self) -> bool:
        return True

    def describe(self) -> str:
        return "built in, as Meta has it"

    def check_template(self) -> None:
        """There is none."""

    def encode(self, messages: list[Message]) -> list[int]:
        ids: list[int] = [self._tokenizer.bos_token_id]
        for message in messages:
            ids += [*self._header(message["role"]), *self._encode_plain(message["content"])]
            ids.append(self._id("<|eot_id|>"))
        if messages and messages[-1]["role"] == "assistant":
            return ids[:-1]  # it is continued
        return ids + self._header("assistant")

    def _header(self, role: str) -> list[int]:
        begin, end = self._id("<|start_header_id|>"), self._id("<|end_header_id|>")
        return [begin, *self._encode_plain(role), end, *self._encode_plain("\n\n")]

    def _id(self, token: str) -> int:
        found: int = self._tokenizer.convert_tokens_to_ids(token)
        return found


def _refuse_large_operations(template: str) -> None:
    with contextlib.suppress(TemplateSyntaxError):  # it is refused where it is used
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        factors = [
            side.value
            for product in tree.find_all(nodes.Mul)
            for side in (product.left, product.right)
            if isinstance(side, nodes.Const) and isinstance(side.value, int)
        ]
        if any(tree.find_all(nodes.Pow)) or any(f > LARGEST_FACTOR for f in factors):
            raise CheckpointError(ENDLESS)


@contextlib.contextmanager
def _at_most(lines: int) -> Iterator[None]:
    """Let so many lines of a template run."""

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        lines -= event == "line"
        if lines < 0:
            raise _TooLong
        return count

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        return count if frame.f_code.co_filename == TEMPLATE_FILE else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    except _TooLong:
        raise CheckpointError(ENDLESS) from None
    finally:
        sys.settrace(before)


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of `names`, the longest first; None for none."""
    ordered = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _split_keeping(text: str, pattern: re.Pattern[str] | None) -> list[str]:
    if pattern is None:
        return [text]
    return [piece for piece in re.split(f"({pattern.pattern})", text) if piece]


def _unused_characters(text: str) -> tuple[str, str]:
    """Two private-use characters that do not occur in `text`."""
    used = set(text)
    free = (chr(c) for c in _PRIVATE_USE if chr(c) not in used)
    try:
        return next(free), next(free)
    except StopIteration:
        raise InvalidRequest(
            "the messages use every private-use character of Unicode", param="messages"
        ) from None
