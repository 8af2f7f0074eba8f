"""The walls of the house, and what the documents say of it."""

import ast
import re
from pathlib import Path

import pytest

import llama3_service

ROOT = Path(__file__).parent.parent


def rooms() -> list[Path]:
    return [*ROOT.glob("stream_*/**/*.py"), *ROOT.glob("chat_page/*.py")]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("stream_generator", {"flask", "gradio", "waitress", "werkzeug", "stream_service"}),
        ("stream_service", {"torch", "transformers", "gradio"}),
        ("chat_page", {"torch", "transformers", "flask", "stream_generator"}),
    ],
)
def test_the_wall_between_engine_and_http_stands(room: str, forbidden: set[str]) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        found = {name.partition(".")[0] for name in imported(path)} & forbidden
        assert not found, f"{path.name} imports {found}"


def test_imports_go_one_way() -> None:
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in rooms()}
    uses = {name: imported(path) & files.keys() for name, path in files.items()}
    done: set[str] = set()
    while ready := [name for name in uses if name not in done and uses[name] <= done]:
        done.update(ready)
    assert done == files.keys(), f"a circle among {files.keys() - done}"


def test_no_private_method_of_transformers_is_called() -> None:
    pattern = re.compile(r"\b(?:model|self\.checkpoint\.model|tokenizer|config)\._\w+")
    for path in ROOT.glob("stream_*/**/*.py"):
        assert not pattern.findall(path.read_text()), path.name


def test_the_picture_of_the_house_names_every_room() -> None:
    picture = (ROOT / "docs" / "architecture.md").read_text()
    for path in [*rooms(), *ROOT.glob("*.py")]:
        if path.name != "__init__.py":
            assert f"`{path.name}`" in picture, path


READMES = ["README.md", "README_zh.md"]


@pytest.mark.parametrize("name", READMES)
def test_the_readmes_table_of_flags_is_the_commands_own(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        llama3_service.parse_arguments(["--help"])
    flags = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", capsys.readouterr().out))
    table = "\n".join(
        line for line in (ROOT / name).read_text().splitlines() if line.startswith("| `-")
    )
    assert set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", table)) == flags - {"-h", "--help"}


def test_both_readmes_have_the_same_commands_and_the_same_shape() -> None:
    texts = [(ROOT / name).read_text() for name in READMES]
    blocks = [re.findall(r"```(?:bash|python|json)\n(.*?)```", text, re.S) for text in texts]
    assert blocks[0] == blocks[1]
    headings = [re.findall(r"^#+", text, re.M) for text in texts]
    assert headings[0] == headings[1]


def test_links_between_the_documents_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
