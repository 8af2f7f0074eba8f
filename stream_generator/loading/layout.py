"""Finds the model that `--ckpts` names: a directory, a file, a hub id, or the demo model."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from transformers import __version__ as version

from stream_generator.errors import CheckpointError, first_line
from stream_generator.loading.cache import SourceCache
from stream_generator.loading.demo_model import DEMO_NAME, demo_gguf
from stream_generator.loading.diagnosis import (
    reject_adapter,
    reject_gguf_of_other_kind,
    reject_packed_for_mlx,
    reject_pointer,
    reject_pointers,
    where_it_may_be,
)
from stream_generator.loading.gguf.file import GgufFile, is_gguf
from stream_generator.loading.gguf.parts import first_parts
from stream_generator.loading.hub import download_file, download_model
from stream_generator.loading.meta_checkpoint import convert_meta_checkpoint, is_meta_layout
from stream_generator.loading.untrusted import weight_files

HUGGING_FACE, HUB, GGUF, META, DEMO = (
    "a directory in Hugging Face format", "a model from the hub", "a GGUF file",
    "Meta's original layout", "the demo model",
)  # fmt: skip
ACCEPTED = (
    "a directory in Hugging Face format (config.json, tokenizer, *.safetensors) or in Meta's "
    "layout (params.json, tokenizer.model, consolidated.*.pth), a .gguf file, or a hub id, also as "
    "id@revision or id:file.gguf (set HF_TOKEN for gated models)"
)

# name or namespace/name; then optionally @revision and :file.gguf
_HUB_ID = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?(?::([\w./ -]+\.gguf))?")


@dataclass(frozen=True)
class LocatedModel:
    """A model whose files are on this machine.

    directory: its configuration and tokenizer in Hugging Face format, and its weights unless `gguf`
    holds them.
    """

    layout: str
    directory: Path
    name: str
    gguf: GgufFile | None = None
    source: Path | None = None  # the user's directory, if `directory` is a tidy copy of it

    @property
    def origin(self) -> Path:
        """The directory or file that the user named, or its download."""
        return self.gguf.path if self.gguf else self.source or self.directory

    @classmethod
    def of_gguf(cls, path: Path, layout: str = GGUF, name: str | None = None) -> Self:
        """Return the model of a GGUF file. Raises `CheckpointError` if the file is not readable."""
        reject_gguf_of_other_kind(path)
        file = GgufFile(path)
        return cls(layout, file.facts(), name or file.name, file)

    def dense_directory(self) -> Path:
        """Return a directory that transformers can load. Converts a GGUF once."""
        return self.gguf.dense() if self.gguf else self.directory

    def cache(self) -> SourceCache:
        if self.gguf:
            return self.gguf.cache
        files = [*weights_in(self.directory), self.directory / "config.json"]
        return SourceCache(self.origin, files)


def locate(source: str | None, *, allow_pickle: bool = False) -> LocatedModel:
    """Find the model that `source` names; None is the demo model. See `ACCEPTED` for all forms.

    Downloads hub models, and converts Meta's layout. allow_pickle: accept pickled weights from the
    hub. Raises `CheckpointError` if there is no such model.
    """
    if source is None:
        return LocatedModel.of_gguf(demo_gguf(), DEMO, DEMO_NAME)
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_directory(path)
    if path.is_file():
        reject_pointer(path)
        if not is_gguf(path):
            raise CheckpointError(f"{source} is not a GGUF file; --ckpts takes {ACCEPTED}")
        return LocatedModel.of_gguf(path)
    if source.startswith((".", "/", "~")) or not (found := _HUB_ID.fullmatch(source)):
        raise CheckpointError(f"{source} does not exist; --ckpts takes {ACCEPTED}")
    name, revision, file = found.groups()
    if file is None:
        return LocatedModel(HUB, download_model(name, revision, allow_pickle=allow_pickle), name)
    return LocatedModel.of_gguf(download_file(name, file, revision))


def _in_directory(path: Path) -> LocatedModel:
    reject_pointers(path)
    reject_adapter(path)
    reject_packed_for_mlx(path)
    name = path.resolve().name
    ggufs = first_parts(sorted(path.glob("*.gguf")))
    if (path / "config.json").is_file() and (weights_in(path) or not ggufs):
        return LocatedModel(HUGGING_FACE, path, name)
    if is_meta_layout(path):
        return LocatedModel(META, convert_meta_checkpoint(path), name)
    if len(ggufs) == 1:
        return LocatedModel.of_gguf(ggufs[0])
    if ggufs:
        names = ", ".join(p.name for p in ggufs[:8])
        raise CheckpointError(f"{path} holds several GGUF files; name one of them: {names}")
    if place := where_it_may_be(path):
        raise CheckpointError(f"{path} holds no checkpoint: {place}")
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(f"{path} holds no checkpoint (found: {found}); --ckpts takes {ACCEPTED}")


def weights_in(directory: Path) -> list[Path]:
    """List the weight files that transformers loads: safetensors, else pickles, else none.

    Raises `CheckpointError` if some, but not all, of the files that an index names are missing.
    """
    for kind in ("model.safetensors", "pytorch_model.bin"):
        files = [directory / name for name in weight_files(directory, kind)]
        missing = [file.name for file in files if not file.is_file()]
        if not missing:
            return files
        if len(missing) < len(files):
            raise CheckpointError(
                f"{directory} lacks {len(missing)} of {len(files)} weight files ({missing[0]}, "
                "...); copy or download these files too"
            )
    return []


def could_not_load(source: str | None, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"could not load {source or DEMO}: {first_line(error)}; check that transformers {version} "
        "supports the model, that its files belong together, and that the options fit it"
    )
