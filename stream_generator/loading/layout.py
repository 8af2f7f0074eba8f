"""What people have of a model, found by looking: a directory, a file, a hub id, or nothing."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from stream_generator.errors import CheckpointError, first_line
from stream_generator.loading.cache import SourceCache
from stream_generator.loading.demo_model import DEMO_NAME, demo_gguf
from stream_generator.loading.gguf.file import GgufFile, is_gguf
from stream_generator.loading.hub import downloaded_file, downloaded_model
from stream_generator.loading.meta_checkpoint import converted_meta_checkpoint, is_meta_layout
from stream_generator.loading.untrusted import weight_files

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
    """A model: what it was found as, and where its parts are.

    directory: its configuration and tokenizer in Hugging Face format, and its weights unless they
    are in a GGUF file.
    """

    layout: str
    directory: Path
    name: str
    gguf: GgufFile | None = None

    @classmethod
    def of_gguf(cls, path: Path, layout: str = GGUF, name: str | None = None) -> Self:
        """The model of a GGUF file. Raises `CheckpointError` for what cannot be read."""
        file = GgufFile(path)
        return cls(layout, file.facts(), name or path.stem, file)

    def dense_directory(self) -> Path:
        """The whole model as a directory that transformers can load, converted if need be."""
        return self.gguf.dense() if self.gguf else self.directory

    def cache(self) -> SourceCache:
        """What is kept of it."""
        if self.gguf:
            return self.gguf.cache
        return SourceCache(self.directory, weights_in(self.directory))


def locate(source: str | None, *, allow_pickle: bool = False) -> Located:
    """Find out what `source` names, and bring or convert it where it cannot be loaded as it is.

    allow_pickle: whether pickled weights in Hugging Face format will do.
    Raises `CheckpointError` for what is none of `ACCEPTED`.
    """
    if source is None:
        return Located.of_gguf(demo_gguf(), DEMO, DEMO_NAME)
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_directory(path)
    if path.is_file():
        if not is_gguf(path):
            raise CheckpointError(f"{source} is no GGUF file; --ckpts takes {ACCEPTED}")
        return Located.of_gguf(path)
    if source.startswith((".", "/", "~")) or not (found := _HUB_ID.fullmatch(source)):
        raise CheckpointError(f"{source} does not exist; --ckpts takes {ACCEPTED}")
    name, revision, file = found.groups()
    if file is None:
        return Located(HUB, downloaded_model(name, revision, allow_pickle=allow_pickle), name)
    return Located.of_gguf(downloaded_file(name, file, revision))


def _in_directory(path: Path) -> Located:
    name = path.resolve().name
    ggufs = sorted(path.glob("*.gguf"))
    if (path / "config.json").is_file() and (weights_in(path) or not ggufs):
        return Located(HUGGING_FACE, path, name)
    if is_meta_layout(path):
        return Located(META, converted_meta_checkpoint(path), name)
    if len(ggufs) == 1:
        return Located.of_gguf(ggufs[0])
    if ggufs:
        names = ", ".join(p.name for p in ggufs[:8])
        raise CheckpointError(f"{path} holds several GGUF files; name one of them: {names}")
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(f"{path} holds no checkpoint (found: {found}); --ckpts takes {ACCEPTED}")


def weights_in(directory: Path) -> list[Path]:
    """The files of weights that transformers reads of a directory; pickled ones if no others.

    Raises `CheckpointError` where an index names files that are not there.
    """
    for kind in ("model.safetensors", "pytorch_model.bin"):
        files = [directory / name for name in weight_files(directory, kind)]
        missing = [file.name for file in files if not file.is_file()]
        if not missing:
            return files
        if len(missing) < len(files):
            raise CheckpointError(
                f"{directory} lacks {len(missing)} of {len(files)} files of its weights "
                f"({missing[0]}, ...); download them again"
            )
    return []


def could_not_load(source: str | None, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"could not load {source or 'the demo model'}: {first_line(error)}; --ckpts takes "
        f"{ACCEPTED}"
    )
