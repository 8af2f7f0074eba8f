"""Messages to prompt ids, by the checkpoint's chat template. No message can forge a turn."""

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

from stream_generator.errors import CheckpointError, InvalidRequest, first_line

# Characters that mark control tokens in messages: no script uses them, and templates keep them.
_PRIVATE_USE = range(0xE000, 0xF8FF)

# Limits for short conversations. An ordinary template runs a few hundred lines, counted in the
# Python that Jinja compiles it to.
MAX_TEMPLATE_LINES, MAX_PROMPT_CHARACTERS = 100_000, 1_000_000
MAX_FACTOR = 10_000  # in a template's products: a single larger product may never finish
TEMPLATE_FILE = "<template>"  # the file name that Jinja gives to compiled templates
RUNAWAY_TEMPLATE = (
    "the checkpoint's chat template never finishes, or its prompts are far too long; take the "
    "template from the model's own page, or remove it (chat_template.jinja, or chat_template in "
    "tokenizer_config.json)"
)


# A reply of this text tells what the template writes after a reply. Templates keep plain words.
_REPLY = "Rainbow"


class _TooManyLines(BaseException):
    """A template runs too long. Not an `Exception`, because `_apply_template` catches those."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True)
class Prompt:
    """Prompt ids, and how many messages and tokens were trimmed."""

    ids: list[int]
    trimmed_messages: int = 0
    trimmed_tokens: int = 0


class ChatFormat:
    """Renders conversations with the checkpoint's chat template.

    An ordinary conversation gets exactly the ids of `tokenizer.apply_chat_template`. If a message
    contains the name of a control token (say `<|eot_id|>`), the name is encoded as plain text, so
    no message can end a turn or begin one.
    """

    def __init__(self, tokenizer: Any, source: str = "the tokenizer"):
        """source: where the chat template was found, for `describe`."""
        self._tokenizer, self._source = tokenizer, source
        added = list(tokenizer.added_tokens_decoder.values())
        template = str(tokenizer.chat_template or "")
        self._special = {token.content: token for token in added if token.special}
        # Some checkpoints do not flag their turn tokens as special, but their templates name them.
        unflagged = [
            token.content
            for token in added
            if not token.special and token.content in template and not token.content.isspace()
        ]
        self._id_by_name = {
            token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items()
        }
        self._special_pattern = _alternation(self._special)
        self._control_pattern = _alternation([*self._special, *unflagged])

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat format. Base models have none."""
        template = self._tokenizer.chat_template
        return "default" in template if isinstance(template, dict) else bool(template)

    def describe(self) -> str:
        """The origin of the chat format, in words."""
        return f"from {self._source}" if self.can_chat else "none, so only completions work"

    def fit(self, messages: list[Message], context_length: int) -> Prompt:
        """The prompt of `messages`, trimmed to leave an eighth of the context for the reply.

        Trimming removes the oldest turns. System messages at the beginning stay, and so does the
        last turn, even if the prompt is still too long. The amount to remove is rounded up to whole
        quarters of the context. So several successive prompts of a conversation begin with the same
        turn, and the prefix cache serves what they share. Raises as `encode` does.
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
        def encode_from(start: int) -> list[int]:
            return self.encode(messages[:head] + messages[start:])

        first = bisect.bisect_left(starts, True, key=lambda start: len(encode_from(start)) <= goal)
        start = starts[min(first, len(starts) - 1)]
        kept = encode_from(start)
        return Prompt(kept, start - head, len(ids) - len(kept))

    def encode(self, messages: list[Message]) -> list[int]:
        """The prompt ids of `messages`, up to where the assistant's reply begins.

        If the last message is the assistant's, the prompt ends inside it: the reply continues it.
        Raises `InvalidRequest` if there is no template, or the template rejects the messages.
        """
        if not self.can_chat:
            raise InvalidRequest(
                "this is a base model, which has no chat template; send a text to /v1/completions, "
                "or serve an instruct model",
                param="messages",
            )
        if any(self._pattern_for(m).search(m["content"]) for m in messages):
            return self._encode_guarded(messages)
        ids: list[int] = self._apply_template(messages, tokenize=True)
        return ids

    def check_template(self) -> None:
        """Try the template on a few conversations, before a request depends on it.

        Raises `CheckpointError` if the template runs too long, if its prompt is too long, or if it
        rejects all of them. It may reject some: not every template has system messages.
        """
        _reject_large_operations(str(self._tokenizer.chat_template or ""))
        turns: list[Message] = [
            {"role": role, "content": "Hello."} for role in ("system", "user", "assistant", "user")
        ]
        long = [*turns, *turns[2:] * 20]
        tried = ([turns[1]], turns[:2], turns[1:3], turns, long)
        rejections = []
        for messages in tried if self.can_chat else ():
            try:
                with _line_limit(MAX_TEMPLATE_LINES):
                    if len(self._apply_template(messages, tokenize=False)) > MAX_PROMPT_CHARACTERS:
                        raise CheckpointError(RUNAWAY_TEMPLATE)
            except InvalidRequest as error:
                rejections.append(error)
        if len(rejections) == len(tried):  # such as a template with a syntax error
            raise CheckpointError(
                f"every conversation fails: {first_line(rejections[0])}; correct the template "
                f"({self.describe()}), or remove it to serve completions alone"
            )

    def end_of_turn(self) -> int | None:
        """Return the id of the control token that the template writes after a reply.

        None if there is no template, or if the template writes no control token there.
        """
        if not self.can_chat:
            return None
        turns: list[Message] = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": _REPLY},
        ]
        for messages in (turns[1:], turns):  # few templates have no, or only, system messages
            with contextlib.suppress(InvalidRequest, CheckpointError):
                with _line_limit(MAX_TEMPLATE_LINES):
                    rendered = self._apply_template(messages, tokenize=False, continues=False)
                _, _, after = rendered.rpartition(_REPLY)
                if _REPLY in rendered and (found := self._control_pattern.search(after)):
                    return int(self._id_by_name[found.group()])
        return None

    def _pattern_for(self, message: Message) -> re.Pattern[str]:
        """Matches the names to break up. Replies keep non-special tokens, such as `<think>`."""
        assistant = message["role"] == "assistant"
        return self._special_pattern if assistant else self._control_pattern

    def _encode_guarded(self, messages: list[Message]) -> list[int]:
        """Break up control tokens in messages by a mark, render, and encode piece by piece."""
        special_mark, unflagged_mark = _unused_characters("".join(m["content"] for m in messages))

        def break_up(match: re.Match[str]) -> str:
            name = match.group()
            mark = special_mark if name in self._special else unflagged_mark
            return name[0] + mark + name[1:]

        broken: list[Message] = [
            {**m, "content": self._pattern_for(m).sub(break_up, m["content"])} for m in messages
        ]
        rendered: str = self._apply_template(broken, tokenize=False)
        ids: list[int] = []
        previous = None  # the control token directly before the piece
        for piece in filter(None, re.split(f"({self._special_pattern.pattern})", rendered)):
            token = self._special.get(piece)
            if token is not None:
                ids.append(self._tokenizer.convert_tokens_to_ids(piece))
            else:
                # As the tokenizer does: remove white space after a token that has `rstrip`.
                text = piece.lstrip() if previous is not None and previous.rstrip else piece
                # Plain text may form unflagged tokens, so their halves are encoded separately.
                for part in text.replace(special_mark, "").split(unflagged_mark):
                    ids += self._encode_plain(part)
            previous = token
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        return ids

    def _apply_template(
        self, messages: list[Message], *, tokenize: bool, continues: bool | None = None
    ) -> Any:
        """Render messages. continues: whether a reply continues the last one; None: if a reply."""
        is_reply = bool(messages) and messages[-1]["role"] == "assistant"
        continues = is_reply if continues is None else continues
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tokenize=tokenize,
                add_generation_prompt=not is_reply,
                continue_final_message=continues,
                return_dict=False,
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise InvalidRequest(
                f"the model's chat template rejects these messages: {error}", param="messages"
            ) from error


class MetaChatFormat(ChatFormat):
    """Llama 3's chat format, for Meta's layout, which has no template.

    Encodes each piece of text by itself, as plain text. Source: Meta's llama-models,
    llama3/chat_format.py.
    """

    @property
    def can_chat(self) -> bool:
        return True

    def describe(self) -> str:
        return "built in (Llama 3)"

    def check_template(self) -> None:
        """Do nothing: there is no template."""

    def end_of_turn(self) -> int | None:
        return self._id("<|eot_id|>")

    def encode(self, messages: list[Message]) -> list[int]:
        ids: list[int] = [self._tokenizer.bos_token_id]
        for message in messages:
            ids += [*self._header(message["role"]), *self._encode_plain(message["content"])]
            ids.append(self._id("<|eot_id|>"))
        if messages and messages[-1]["role"] == "assistant":
            return ids[:-1]  # the reply continues this message
        return ids + self._header("assistant")

    def _header(self, role: str) -> list[int]:
        begin, end = self._id("<|start_header_id|>"), self._id("<|end_header_id|>")
        return [begin, *self._encode_plain(role), end, *self._encode_plain("\n\n")]

    def _id(self, token: str) -> int:
        found: int = self._tokenizer.convert_tokens_to_ids(token)
        return found


def _reject_large_operations(template: str) -> None:
    """Raise `CheckpointError` if a template has powers, or products with a large constant."""
    with contextlib.suppress(TemplateSyntaxError):  # `_apply_template` reports it
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        factors = [
            side.value
            for product in tree.find_all(nodes.Mul)
            for side in (product.left, product.right)
            if isinstance(side, nodes.Const) and isinstance(side.value, int)
        ]
        if any(tree.find_all(nodes.Pow)) or any(f > MAX_FACTOR for f in factors):
            raise CheckpointError(RUNAWAY_TEMPLATE)


@contextlib.contextmanager
def _line_limit(lines: int) -> Iterator[None]:
    """Raise `CheckpointError` if templates run more than `lines` lines inside the `with` block."""

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        lines -= event == "line"
        if lines < 0:
            raise _TooManyLines
        return count

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        return count if frame.f_code.co_filename == TEMPLATE_FILE else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    except _TooManyLines:
        raise CheckpointError(RUNAWAY_TEMPLATE) from None
    finally:
        sys.settrace(before)


def _alternation(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of `names`, the longest first; nothing if there are no names."""
    ordered = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def _unused_characters(text: str) -> tuple[str, str]:
    """Two private-use characters that do not occur in `text`."""
    used = set(text)
    free = (chr(c) for c in _PRIVATE_USE if chr(c) not in used)
    try:
        return next(free), next(free)
    except StopIteration:
        raise InvalidRequest(
            "the messages use every private-use character of Unicode; remove some", param="messages"
        ) from None
