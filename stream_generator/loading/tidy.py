"""Makes a tidy copy of a directory whose files transformers would read wrongly, out of links."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from stream_generator.loading.cache import SourceCache
from stream_generator.loading.diagnosis import ADAPTER, read_json
from stream_generator.loading.tokenizer_files import has_only_sentencepiece, write_converted

RULES = 1  # raise this when the rules change, so that cached copies are made again
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
PROCESSOR_FILES = ("chat_template.json", "processor_config.json")  # where processors keep templates
TEXTS = (".json", ".jinja", ".txt")
# Files that the conversion of a tokenizer writes, or whose content it takes over.
REPLACED = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def tidy(directory: Path, cache: Path | None = None) -> Path:
    """Return `directory` if it is tidy, or else a cached directory of links and corrected files.

    Removes byte order marks, writes the chat template of an old processor to its new place, leaves
    out the configuration of an adapter that is merged, and converts tokenizer.model if there is no
    tokenizer.json. Does not change `directory`. Raises `CheckpointError` as `write_converted` does.
    """
    changes = dict(_changes(directory))
    converts = has_only_sentencepiece(directory)
    if not changes and not converts:
        return directory

    def make(target: Path) -> None:
        target.mkdir()
        for file in directory.iterdir():
            if file.name not in changes and not (converts and file.name in REPLACED):
                (target / file.name).symlink_to(file.resolve())
        for name, content in changes.items():
            if content is not None and not (converts and name in REPLACED):
                (target / name).write_text(content, encoding="utf-8", newline="")

        if converts:
            write_converted(directory, target)

    files = [file for file in directory.iterdir() if file.is_file()]
    return SourceCache(directory, files, cache).get("tidy", RULES, make)


def _changes(directory: Path) -> Iterator[tuple[str, str | None]]:
    """Yield names of files with their corrected content; None to leave a file out."""
    for file in directory.iterdir():
        if file.suffix in TEXTS and file.is_file() and (text := _without_mark(file)) is not None:
            yield file.name, text
    if (directory / ADAPTER).is_file():
        yield ADAPTER, None
    if found := _processor_template(directory):
        yield TEMPLATE, found[1]


def _without_mark(file: Path) -> str | None:
    """Return the text of a file that begins with a byte order mark; None for any other file."""
    with file.open("rb") as stream:
        beginning = stream.read(3)
    for mark, encoding in MARKS.items():
        if beginning.startswith(mark):
            try:
                return file.read_bytes().decode(encoding)
            except UnicodeDecodeError:
                return None  # transformers will reject the file
    return None


def template_source(directory: Path) -> str:
    """Return the name of the file that holds the chat template, as `tidy` finds it."""
    if (directory / TEMPLATE).is_file():
        return TEMPLATE
    in_processor = _processor_template(directory)
    return in_processor[0] if in_processor else TOKENIZER_CONFIG


def _processor_template(directory: Path) -> tuple[str, str] | None:
    """Return the template of an old processor and its file's name, if the tokenizer has none."""
    config = read_json(directory / TOKENIZER_CONFIG)
    has_own = isinstance(config, dict) and config.get("chat_template")
    if has_own or (directory / TEMPLATE).is_file():
        return None
    for name in PROCESSOR_FILES:
        content = read_json(directory / name)
        template = content.get("chat_template") if isinstance(content, dict) else None
        if isinstance(template, list):  # several templates with names
            named = [entry for entry in template if isinstance(entry, dict)]
            template = next((x.get("template") for x in named if x.get("name") == "default"), None)
        if isinstance(template, str) and template:
            return name, template
    return None
