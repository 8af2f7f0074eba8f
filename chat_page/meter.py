"""The line of figures below a reply."""

from html import escape
from typing import Any

from chat_page.conversation import Figures
from chat_page.words import Words

_PARAMETER_ORDER = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_new_tokens",
    "max_new_tokens",
    "seed",
)


def meter(figures: Figures, words: Words, position: int | None = None) -> str:
    """Format the figures as HTML. position: of the request in the queue, while it waits."""
    if not figures.completion_tokens:
        return _line([_status(figures, words, position)])
    parts = [words("prompt", prompt=figures.prompt_tokens)]
    if figures.cached_tokens:
        parts[0] += " · " + words("cached", cached=figures.cached_tokens)
    if figures.ttft_ms is not None:
        parts.append(words("first", ms=round(figures.ttft_ms)))
    parts.append(words("written", n=figures.completion_tokens))
    if figures.tokens_per_second is not None:
        parts.append(words("rate", rate=f"{figures.tokens_per_second:.1f}"))
    if figures.trimmed_messages:
        parts.append(words("trimmed", n=figures.trimmed_messages))
    if figures.finish_reason:
        parts.append(_reason(figures.finish_reason, words))
    return _line(parts, _context(figures, words) + _used(figures, words))


def _status(figures: Figures, words: Words, position: int | None) -> str:
    if figures.finish_reason:
        return _reason(figures.finish_reason, words)
    if position:
        return words("queued", position=position)
    if figures.prompt_tokens is None:
        return words("asking")
    return words("reading", prompt=figures.prompt_tokens)


def _line(parts: list[str], rest: str = "") -> str:
    spans = "".join(f"<span>{escape(part)}</span>" for part in parts)
    return f'<div class="meter">{spans}{rest}</div>'


def _reason(reason: str, words: Words) -> str:
    return words(f"ended_{reason}") if reason in ("stop", "length", "abort") else reason


def _context(figures: Figures, words: Words) -> str:
    whole = figures.context_length
    if not whole:
        return ""
    used = (figures.prompt_tokens or 0) + (figures.completion_tokens or 0)
    share = min(100.0, 100 * used / whole)
    text = escape(words("context", used=used, whole=whole))
    bar = f'<span class="bar"><span style="width:{share:.1f}%"></span></span>'
    return f'<span class="context">{bar}{text}</span>'


def _used(figures: Figures, words: Words) -> str:
    """The model and the settings that the service used, folded."""
    if not figures.params:
        return ""
    known = [name for name in _PARAMETER_ORDER if name in figures.params]
    others = sorted(figures.params.keys() - set(known) - {"logprobs"})
    rows = "".join(_row(name, figures.params[name]) for name in [*known, *others])
    if figures.model:
        rows = _row("model", figures.model) + rows
    return f"<details><summary>{escape(words('used'))}</summary><dl>{rows}</dl></details>"


def _row(name: str, value: Any) -> str:
    return f"<div><dt>{escape(name)}</dt><dd>{escape(str(value)[:200])}</dd></div>"
