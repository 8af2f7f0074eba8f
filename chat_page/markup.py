"""A message as the page's Markdown renderer is to read it.

The renderer takes HTML for HTML, and every $ for the beginning of a formula. Rather than escape,
which would show where a message is copied or edited, an invisible character tells it what is meant:
U+2060, the word joiner. Behind < and ! it keeps a tag from being one and an image from loading;
around a formula it makes the delimiter. The page takes it out again when a message is copied or
edited.
"""

import re

MARK = "\u2060"

FORMULAS = (("$$", "$$", True), (r"\[", r"\]", True), (r"\(", r"\)", False), ("$", "$", False))
LATEX_DELIMITERS = [
    {"left": MARK + left, "right": right + MARK, "display": display}
    for left, right, display in FORMULAS
]

# Only what is surely code to every reader of Markdown goes without marks: a span within one line
# and one cell of a table, and fences at the beginning of a line, as long as none stood elsewhere
# (in a list, where it may end with the list). A mark too many is invisible; one too few, HTML.
_FENCE = re.compile(r"`{3,}(?=[^`]*$)|~{3,}")
_UNSURE = re.compile(r"[ \t>*+\-.)\d]+(?:`{3}|~{3})|\s*\[.*\]:")
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
    """`text` with the marks in it; nothing else of it changes, but that its lines end with \\n."""
    text = re.sub(r"\r\n?", "\n", unmarked(text))
    shown: list[str] = []
    prose: list[str] = []
    fence = ""
    is_sure = True
    for line in re.split(r"(?<=\n)", text):
        is_sure = is_sure and not _UNSURE.match(line)
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
    """`text` without marks."""
    return text.replace(MARK, "")


def _marked_prose(text: str) -> str:
    return _PIECE.sub(_marked_piece, text)


def _marked_piece(found: re.Match[str]) -> str:
    if found.lastgroup == "formula":
        return MARK + found[0] + MARK
    return found[0] + MARK if found.lastgroup in ("tag", "image") else found[0]


def _marked_fence(line: str, fence: str) -> str:
    """A diagram in Mermaid's language can carry HTML; under a name with a mark it is code."""
    return fence + MARK + line[len(fence) :] if "mermaid" in line else line
