"""The command `--cache`: lists or deletes cached models."""

import sys

from stream_generator.errors import CheckpointError
from stream_generator.loading.cache import cache_directory, delete, entries


def list_or_delete(names: list[str]) -> int:
    """Delete the named entries; without names, list all. Return the exit status."""
    try:
        for name in names:
            delete(name)
            print(f"deleted {name}")
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    if not names:
        print(f"in {cache_directory()}:")
        for entry in entries():
            print(f"{entry.size / 1e6:10,.0f} MB  {entry.name}  {' '.join(entry.parts)}".rstrip())
    return 0
