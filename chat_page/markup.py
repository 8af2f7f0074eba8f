"""Prepares a message for Gradio's Markdown renderer.

The renderer would read tags as HTML, and every $ as the start of a formula. Escapes would show when
a message is copied or edited. So an invisible character marks what the text means: U+2060, the word
joiner. After < or ! it prevents a tag or an image. For the renderer, a formula begins only with
U+2060 and $ (or a bracket after a backslash), so a plain $ begins none. The page removes the marks
from copied and edited messages.
"""

import re

MARK = "\u2060"

FORMULAS = (("$$", "$$", True), (r"\[", r"\]", True), (r"\(", r"\)", False), ("$", "$", False))
LATEX_DELIMITERS = [
    {"left": MARK + left, "right": right + MARK, "display": display}
    for left, right, display in FORMULAS
]

# Text stays unmarked only if every Markdown parser reads it as code: a span within one line and one
# table cell, or a fence at the start of a line. After an ambiguous line, such as a fence in a list,
# fenced text is marked too. A needless mark is invisible; a missing mark lets HTML through.
_FENCE = re.compile(r"`{3,}(?=[^`]*$)|~{3,}")
_AMBIGUOUS = re.compile(r"[ \t>*+\-.)\d]+(?:`{3}|~{3})|\s*\[.*\]:")
_PIECE = re.compile(
    r"""
    (?P<escape> \\[^\[(] )
  | (?P<code> (?<!`) (?P<ticks>`+) (?!`) [^\n|]+? (?<!`) (?P=ticks) (?!`) )
  | (?P<link> <https?://[^\s<>]+> )
  | (?P<formula>
        \$\$ (?:(?!\n\s*\n)[^$])+ \$\$
      | \\\[ (?:(?!\n\s*\n).)+? \\\]
      | \\\( (?:(?!\n\s*\n).)+? \\\)
      | (?<![\w$]) \$ (?![\s$]) (?:\\.|[^$\n\\])+? (?<!\s) \$ (?![\d$])
    )
  | (?P<tag> < (?=[A-Za-z/!?]) )
  | (?P<image> ! (?=\[) )
    """,
    re.VERBOSE | re.DOTALL,
)


def marked(text: str) -> str:
    """Insert marks into `text`. Nothing else changes, except that all lines end with \\n."""
    text = re.sub(r"\r\n?", "\n", unmarked(text))
    shown: list[str] = []
    prose: list[str] = []
    fence = ""
    is_sure = True
    for line in re.split(r"(?<=\n)", text):
        is_sure = is_sure and not _AMBIGUOUS.match(line)
        if fence:
            shown.append(line if is_sure else _marked_prose(line))
            if re.fullmatch(rf" {{0,3}}{fence}[~`]* *\n?", line):
                fence = ""
        elif opening := _FENCE.match(line):
            fence = opening[0]
            shown += [_marked_prose("".join(prose)), _marked_fence(line, fence)]
            prose = []
        else:
            prose.append(line)
    return "".join([*shown, _marked_prose("".join(prose))])


def unmarked(text: str) -> str:
    """Remove all marks from `text`."""
    return text.replace(MARK, "")


def _marked_prose(text: str) -> str:
    return _PIECE.sub(_marked_piece, text)


def _marked_piece(found: re.Match[str]) -> str:
    if found.lastgroup == "formula":
        return MARK + found[0] + MARK
    return found[0] + MARK if found.lastgroup in ("tag", "image") else found[0]


def _marked_fence(line: str, fence: str) -> str:
    """Mark the language of a Mermaid diagram, which can contain HTML, so that it shows as code."""
    return fence + MARK + line[len(fence) :] if "mermaid" in line else line
