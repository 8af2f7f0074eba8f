"""What each package may import, the sizes of the code, and the state of the documents."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stream_generator
import stream_generator.checkpoint

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README_zh.md"]


def modules() -> list[Path]:
    return [*ROOT.glob("stream_*/**/*.py"), *ROOT.glob("chat_page/*.py")]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, also inside of functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


FORBIDDEN = {
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


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_no_module_that_is_forbidden_to_it(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        found = {
            name
            for name in imported(path)
            if any(name == other or name.startswith(f"{other}.") for other in FORBIDDEN[package])
        }
        assert not found, f"{path.name} imports {found}"


def test_the_package_exports_five_names_and_imports_torch_only_when_one_is_used() -> None:
    names = ["Engine", "SamplingParams", "init_stream_support", "load_checkpoint"]
    assert stream_generator.__all__ == [*names, "stream_generate"]
    for name in stream_generator.__all__:
        assert getattr(stream_generator, name).__name__ == name
    program = "import sys, stream_generator; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_stream_generator_checkpoint_is_the_only_old_import_path() -> None:
    shims = [path for path in modules() if path.read_text().startswith('"""An old path')]
    assert [path.relative_to(ROOT).as_posix() for path in shims] == [
        "stream_generator/checkpoint.py"
    ]
    assert stream_generator.checkpoint.load_checkpoint is stream_generator.load_checkpoint


def test_imports_go_one_way() -> None:
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in modules()}
    uses = {name: imported(path) & files.keys() for name, path in files.items()}
    done: set[str] = set()
    while ready := [name for name in uses if name not in done and uses[name] <= done]:
        done.update(ready)
    assert done == files.keys(), f"circular imports among {files.keys() - done}"


def test_only_graph_session_imports_onnx_runtime() -> None:
    """Without ONNX Runtime, the code for models without a graph can still be imported."""
    users = [path.name for path in modules() if "onnxruntime" in imported(path)]
    assert users == ["graph_session.py"]
    program = (
        "import sys; sys.modules['onnx'] = sys.modules['onnxruntime'] = None\n"
        "import stream_generator.generate, stream_generator.engine.warm_up"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


LONG_FUNCTIONS = {"load_checkpoint"}  # allowed, because their steps are numbered
MAX_CLASS_LINES, MAX_FUNCTION_LINES = 250, 60


def test_classes_and_functions_are_short() -> None:
    too_long = set()
    for path in [*modules(), *ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                is_class = isinstance(node, ast.ClassDef)
                if lines > (MAX_CLASS_LINES if is_class else MAX_FUNCTION_LINES):
                    too_long.add(node.name)
    assert too_long == LONG_FUNCTIONS


CORE = (
    "loop", "request", "text/detokenizer", "sampling/processors", "sampling/sampler",
    "model/kv_cache", "engine/scheduler", "engine/batch", "engine/engine",
)  # fmt: skip


def test_the_core_files_have_under_1500_lines_together() -> None:
    text = "".join((ROOT / "stream_generator" / f"{name}.py").read_text() for name in CORE)
    assert sum(1 for line in text.splitlines() if line.strip()) < 1500


def test_the_readmes_are_short() -> None:
    for name in READMES:
        assert len((ROOT / name).read_text().splitlines()) <= 130, name


def test_no_private_method_of_transformers_is_called() -> None:
    pattern = re.compile(r"\b(?:model|self\.checkpoint\.model|tokenizer|config)\._\w+")
    for path in ROOT.glob("stream_*/**/*.py"):
        assert not pattern.findall(path.read_text()), path.name


def test_the_architecture_document_names_every_file() -> None:
    architecture = (ROOT / "docs" / "architecture.md").read_text()
    for path in [*modules(), *ROOT.glob("*.py")]:
        if path.name != "__init__.py":
            name = path.name if path.parent.name != "gguf" else f"gguf/{path.name}"
            assert f"`{name}`" in architecture, path


def test_both_readmes_have_the_same_code_blocks_and_heading_levels() -> None:
    texts = [(ROOT / name).read_text() for name in READMES]
    blocks = [re.findall(r"```(?:bash|python|json)\n(.*?)```", text, re.S) for text in texts]
    assert blocks[0] == blocks[1]
    headings = [re.findall(r"^#+", text, re.M) for text in texts]
    assert headings[0] == headings[1]


def test_links_in_the_documents_lead_to_existing_files() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


TESTS = ROOT / "tests"
PATCHES = {"setattr", "delattr", "getattr"}
ALLOWED = {
    "test_page.py": {"_queue"},  # an attribute of Gradio; our packages use the same name
}


def defined_privates() -> set[str]:
    """The private names that our packages and commands define: functions, classes, attributes."""
    names: set[str] = set()
    for path in [*modules(), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    names.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
    return {name for name in names if re.match("_[a-zA-Z]", name)}


def privates_read(source: str, defined: set[str]) -> set[str]:
    """The private names of our packages that a test file reads, imports or patches.

    `self._x` and `super()._x` belong to a test's own class. Other libraries' names do not count.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(
                value=ast.Name(id="self" | "cls") | ast.Call(func=ast.Name("super"))
            ):
                pass
            case ast.Attribute(attr=name):
                found.add(name)
            case ast.ImportFrom(names=aliases):
                found |= {alias.name for alias in aliases}
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)) if name in PATCHES:
                words = [word.value for word in node.args if isinstance(word, ast.Constant)]
                found |= {str(word).rpartition(".")[2] for word in words}
    return found & defined


def test_no_test_reads_a_private_name_of_our_packages() -> None:
    defined = defined_privates()
    assert {"_batch", "_changed"} <= defined
    for path in TESTS.rglob("*.py"):
        read = privates_read(path.read_text(), defined) - ALLOWED.get(path.name, set())
        assert not read, f"{path.relative_to(ROOT)} reads {', '.join(sorted(read))}"


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("engine._batch.waiting", True),
        ("stream.close()._batch", True),
        ("from stream_generator.engine.engine import _batch", True),
        ("monkeypatch.setattr('stream_generator.engine.engine._batch', None)", True),
        ("monkeypatch.setattr(engine, '_batch', None)", True),
        ("getattr(engine, '_batch')", True),
        ("self._batch = super()._batch", False),
        ("demo._queue", False),
        ("engine.requests", False),
    ],
)
def test_the_check_for_private_names_finds_each_way_to_read_one(
    source: str, is_found: bool
) -> None:
    assert bool(privates_read(source, {"_batch"})) == is_found


def test_no_test_file_is_over_400_lines() -> None:
    too_long = {
        path.name: length
        for path in TESTS.rglob("*.py")
        if (length := len(path.read_text().splitlines())) > 400
    }
    assert not too_long, f"split by subject: {too_long}"
