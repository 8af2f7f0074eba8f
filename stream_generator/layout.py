"""What people have of a model, found by looking: a directory, a file, a hub id, or nothing."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from stream_generator.demo_model import DEMO_NAME, demo_model_directory
from stream_generator.errors import CheckpointError
from stream_generator.gguf_checkpoint import converted_gguf, is_gguf
from stream_generator.meta_checkpoint import converted_meta_checkpoint, is_meta_layout

HUGGING_FACE, HUB, GGUF, META, DEMO = (
    "a directory in Hugging Face format", "a model of the hub", "a GGUF file",
    "Meta's original layout", "the demo model",
)  # fmt: skip
ACCEPTED = (
    "a directory in Hugging Face format (config.json, tokenizer, *.safetensors), one as Meta "
    "distributes it (params.json, tokenizer.model, consolidated.*.pth), a .gguf file, or the id of "
    "a model on the hub, also as id@revision and id:file.gguf (HF_TOKEN for gated ones)"
)

# namespace/name, or a name alone; then a revision, or a file in it
_HUB_ID = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?(?::([\w./ -]+\.gguf))?")


@dataclass(frozen=True)
class Located:
    """Where transformers finds a model, and what it was found as.

    path: a directory, or the id of a model on the hub with its revision.
    """

    layout: str
    path: str
    name: str
    revision: str | None = None

    def directory(self) -> Path:
        """Where its files lie; of a model of the hub, after it was loaded once."""
        if self.layout != HUB:
            return Path(self.path)
        return Path(snapshot_download(self.path, revision=self.revision, local_files_only=True))


def locate(source: str | None) -> Located:
    """Find out what `source` names, and convert it where transformers could not load it.

    Raises `CheckpointError` for what is none of `ACCEPTED`.
    """
    if source is None:
        return Located(DEMO, str(demo_model_directory()), DEMO_NAME)
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_directory(path)
    if path.is_file():
        if not is_gguf(path):
            raise CheckpointError(f"{source} is no GGUF file; --ckpts takes {ACCEPTED}")
        return Located(GGUF, str(converted_gguf(path)), path.stem)
    if source.startswith((".", "/", "~")) or not (found := _HUB_ID.fullmatch(source)):
        raise CheckpointError(f"{source} does not exist; --ckpts takes {ACCEPTED}")
    name, revision, file = found.groups()
    if file is None:
        return Located(HUB, name, name, revision)
    try:
        downloaded = Path(hf_hub_download(name, file, revision=revision))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"could not get {file} of {name}: {error}") from error
    return Located(GGUF, str(converted_gguf(downloaded)), downloaded.stem)


def _in_directory(path: Path) -> Located:
    name = path.resolve().name
    if (path / "config.json").is_file():
        return Located(HUGGING_FACE, str(path), name)
    if is_meta_layout(path):
        return Located(META, str(converted_meta_checkpoint(path)), name)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return Located(GGUF, str(converted_gguf(ggufs[0])), ggufs[0].stem)
    if ggufs:
        names = ", ".join(p.name for p in ggufs[:8])
        raise CheckpointError(f"{path} holds several GGUF files; name one of them: {names}")
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(f"{path} holds no checkpoint (found: {found}); --ckpts takes {ACCEPTED}")


def refuse_unsafe(directory: Path) -> None:
    """Raise `CheckpointError` where a directory names code of its own, or leads out of itself."""
    for file in [*directory.glob("*config.json"), *directory.glob("*.index.json")]:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} is not JSON ({error}); download it again") from error
        if _names(content, "auto_map"):
            raise CheckpointError(
                f"{file} names code of the checkpoint's own (auto_map), which is not run here; use "
                "a model that transformers itself knows, or take auto_map out if it does"
            )
        if file.name.endswith(".index.json"):
            for part in set(content.get("weight_map", {}).values()):
                if Path(part).name != part:
                    raise CheckpointError(f"{file} leads out of its directory ({part})")
    # The hub's own cache keeps what a directory links to in one beside it.
    allowed = [directory.resolve(), directory.resolve().parent.parent / "blobs"]
    for file in directory.iterdir():
        target = file.resolve()
        if file.is_symlink() and not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(f"{file} is a link out of its directory, to {target}")


def _names(value: object, key: str) -> bool:
    """Whether a key occurs anywhere in a JSON value."""
    if isinstance(value, dict):
        return key in value or any(_names(inner, key) for inner in value.values())
    return isinstance(value, list) and any(_names(inner, key) for inner in value)
