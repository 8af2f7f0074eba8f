"""Finds the parts of a GGUF file that is split: name-00001-of-00003.gguf and so on."""

import re
from pathlib import Path

from stream_generator.errors import CheckpointError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)?")


def part_names(name: str) -> list[str]:
    """Return the names of all parts, the first one first, from the name of any file.

    A file that is not split is its only part.
    """
    found = _PART.fullmatch(name)
    if found is None:
        return [name]
    stem, _, count, suffix = found.groups(default="")
    return [f"{stem}-{n:05}-of-{count}{suffix}" for n in range(1, int(count) + 1)] or [name]


def whole_name(name: str) -> str:
    """Return a file's name without its suffix and the number of its part."""
    found = _PART.fullmatch(name)
    return found[1] if found else name.removesuffix(".gguf")


def find_parts(path: Path) -> list[Path]:
    """Return the paths of all parts. Raises `CheckpointError` if one of them is missing."""
    paths = [path.with_name(name) for name in part_names(path.name)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing and len(paths) > 1:
        raise CheckpointError(
            f"{path.name} is one of {len(paths)} parts, and {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} missing in {path.parent}; download "
            f"{'it' if len(missing) == 1 else 'them'} too"
        )
    return paths


def first_parts(paths: list[Path]) -> list[Path]:
    """Keep one path of each file: the first part that exists."""
    seen: dict[str, Path] = {}
    for path in sorted(paths):
        seen.setdefault(part_names(path.name)[0], path)
    return list(seen.values())
