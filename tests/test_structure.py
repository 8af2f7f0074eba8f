"""The walls of the house, and what the documents say of it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llama3_service
import stream_generator
import stream_generator.checkpoint

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


WALLS = {
    "stream_generator": {"flask", "gradio", "waitress", "werkzeug", "stream_service"},
    "stream_generator/text": {
        "torch", *(f"stream_generator.{name}" for name in (
            "request", "loaded_model", "sampling", "model", "engine", "loading",
        )),
    },
    "stream_generator/sampling": {
        f"stream_generator.{name}" for name in ("loaded_model", "model", "engine", "loading")
    },
    "stream_generator/model": {
        f"stream_generator.{name}"
        for name in ("request", "loaded_model", "text", "sampling", "engine", "loading")
    },
    "stream_generator/engine": {"stream_generator.loading"},
    "stream_generator/loading": {"stream_generator.engine"},
    "stream_service": {"torch", "transformers", "gradio"},
    "chat_page": {"torch", "transformers", "flask", "stream_generator"},
}  # fmt: skip


@pytest.mark.parametrize("package", WALLS)
def test_a_package_does_not_know_what_is_not_its_business(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        found = {
            name
            for name in imported(path)
            if any(name == wall or name.startswith(f"{wall}.") for wall in WALLS[package])
        }
        assert not found, f"{path.name} imports {found}"


def test_what_a_program_needs_is_at_the_front_and_imported_when_it_is_used() -> None:
    names = ["Engine", "SamplingParams", "init_stream_support", "load_checkpoint"]
    assert stream_generator.__all__ == [*names, "stream_generate"]
    for name in stream_generator.__all__:
        assert getattr(stream_generator, name).__name__ == name
    program = "import sys, stream_generator; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_old_paths_stay_for_one_release() -> None:
    shims = [path for path in rooms() if path.read_text().startswith('"""An old path')]
    assert [path.relative_to(ROOT).as_posix() for path in shims] == [
        "stream_generator/checkpoint.py"
    ]
    assert stream_generator.checkpoint.load_checkpoint is stream_generator.load_checkpoint


def test_imports_go_one_way() -> None:
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in rooms()}
    uses = {name: imported(path) & files.keys() for name, path in files.items()}
    done: set[str] = set()
    while ready := [name for name in uses if name not in done and uses[name] <= done]:
        done.update(ready)
    assert done == files.keys(), f"a circle among {files.keys() - done}"


def test_onnx_runtime_is_imported_in_one_place() -> None:
    """What runs without a graph works where it is not installed."""
    users = [path.name for path in rooms() if "onnxruntime" in imported(path)]
    assert users == ["graph_session.py"]
    program = (
        "import sys; sys.modules['onnx'] = sys.modules['onnxruntime'] = None\n"
        "import stream_generator.generate, stream_generator.engine.warm_up"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_no_private_method_of_transformers_is_called() -> None:
    pattern = re.compile(r"\b(?:model|self\.checkpoint\.model|tokenizer|config)\._\w+")
    for path in ROOT.glob("stream_*/**/*.py"):
        assert not pattern.findall(path.read_text()), path.name


def test_the_picture_of_the_house_names_every_room() -> None:
    picture = (ROOT / "docs" / "architecture.md").read_text()
    for path in [*rooms(), *ROOT.glob("*.py")]:
        if path.name != "__init__.py":
            name = path.name if path.parent.name != "gguf" else f"gguf/{path.name}"
            assert f"`{name}`" in picture, path


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
    in_table = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", table))
    assert in_table == flags - {"-h", "--help", "--version"}


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
