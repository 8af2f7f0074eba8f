"""docs/command-line.md is what docs/generate.py makes from the flags of both commands."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_document_has_the_flags_of_both_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a narrow terminal, and without a secret of the environment."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LLAMA3_API_KEY", "secret")
    monkeypatch.setenv("LLAMA3_APP_AUTH", "name:secret")
    text = runpy.run_path(str(ROOT / "docs" / "generate.py"))["document"]()
    assert text == (ROOT / "docs" / "command-line.md").read_text(), "run python docs/generate.py"


def test_each_flag_of_the_service_names_its_default() -> None:
    table = (ROOT / "docs" / "command-line.md").read_text().partition("## llama3-app")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `-")]
    without = {flags.strip("| `") for flags, _, default, _ in rows if not default.strip()}
    assert without == {"--version", "--cache"}, "these flags have nothing to default to"
