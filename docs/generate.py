"""Write docs/command-line.md from the flags of both commands.

python docs/generate.py
"""

import importlib
import sys
from argparse import SUPPRESS, Action
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "command-line.md"
MODULES = {"llama3-service": "stream_service.command_line", "llama3-app": "llama3_app"}
INTRODUCTION = """# Command line

`pip install .` installs two commands. A clone also runs them without installation:
`python llama3_service.py` and `python llama3_app.py`. `--help` prints these flags.

This file is generated: change the help texts of the commands, then run `python docs/generate.py`.
"""


def document() -> str:
    """The whole text. It depends on no terminal width, environment variable or Python version."""
    parts = [INTRODUCTION]
    for name, module in MODULES.items():
        parser = importlib.import_module(module).make_parser()
        parts.append(f"## {name}\n\n{parser.description}\n")
        for group in parser._action_groups:  # argparse has no public list of flags
            rows = [row_of(action) for action in group._group_actions if is_shown(action)]
            if rows:
                parts.append(f"### {str(group.title).capitalize()}\n\n{table(rows)}\n")
    return "\n".join(parts)


def is_shown(action: Action) -> bool:
    return action.help != SUPPRESS and "--help" not in action.option_strings


def row_of(action: Action) -> list[str]:
    """Flag, argument, default, meaning. The help text names the default in its last parentheses."""
    text = " ".join(str(action.help).split()) % {**vars(action), "prog": "%(prog)s"}
    meaning, _, default = text.removesuffix(")").partition(" (default: ")
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
    return [flags, argument_of(action), default, meaning if default else text]


def argument_of(action: Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    name = str(action.metavar or action.dest.upper())
    return f"`[{name} ...]`" if action.nargs == "*" else f"`{name}`"


def table(rows: list[list[str]]) -> str:
    lines = [["flag", "argument", "default", "meaning"], ["---"] * 4, *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in r) + " |" for r in lines
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    TARGET.write_text(document())
