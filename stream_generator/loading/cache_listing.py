"""The command `--cache`: what the cache holds, for a person, and how to delete some of it."""

import sys

from stream_generator.errors import CheckpointError
from stream_generator.loading.cache import cache_directory, delete, entries


def list_or_delete(names: list[str]) -> int:
    """Delete these entries of the cache, or list all if there are none; returns the status."""
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
