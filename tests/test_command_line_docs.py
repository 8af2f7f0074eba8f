"""docs/command-line.md is what docs/generate.py generates from the flags of both commands."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_command_line_document_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text depends neither on the terminal's width nor on secrets in the environment."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LLAMA3_API_KEY", "secret")
    monkeypatch.setenv("LLAMA3_APP_AUTH", "name:secret")
    text = runpy.run_path(str(ROOT / "docs" / "generate.py"))["document"]()
    assert text == (ROOT / "docs" / "command-line.md").read_text(), "run python docs/generate.py"


def test_the_command_line_document_has_each_flags_default() -> None:
    table = (ROOT / "docs" / "command-line.md").read_text().partition("## llama3-app")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `-")]
    without_default = {flags.strip("| `") for flags, _, default, _ in rows if not default.strip()}
    assert without_default == {"--version", "--cache"}, "only these flags have no default"
