"""Share a workload, flags, statistics, tables, charts and result files between benchmarks.

    args = add_flags(parser_for(__doc__), rounds=5).parse_args()
    write_report("name", {"settings": vars(args), "rounds": runs})

Importing this module loads neither torch nor requests. A benchmark can therefore set threads or
patch the standard library first.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))  # the benchmarks run as scripts and import the packages of ROOT

TOKENS = 96  # new tokens of a reply
SAMPLING: dict[str, Any] = {"temperature": 0.6, "top_p": 0.9}
TOPICS = [
    "how a rainbow forms", "why the sky is blue", "how bread rises", "what makes a good friend",
    "how a bicycle stays upright", "why leaves turn red", "how the tides work", "what a fuse does",
]  # fmt: skip
FILLER = "the bees near the old mill gather honey from lime trees in early summer and "
HELP = {
    "rounds": "number of rounds",
    "seconds": "length of each load in seconds",
    "name": "name of the result files, without suffix",
}


def question(number: int) -> str:
    """Write a question of about 70 tokens, chat template included.

    No two questions share a beginning, so a service cannot reuse the keys of an earlier prompt.
    """
    topic = TOPICS[number % len(TOPICS)]
    return f"Question {number}: explain {topic}, in plain words for a child of ten, step by step."


def parser_for(docstring: str) -> argparse.ArgumentParser:
    """Create a parser that describes the script by the first line of its docstring."""
    return argparse.ArgumentParser(description=docstring.splitlines()[0])


def add_flags(parser: argparse.ArgumentParser, **defaults: Any) -> argparse.ArgumentParser:
    """Add flags from `HELP`. Each flag has the type of its default."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=HELP[name])
    return parser


def machine() -> dict[str, Any]:
    """Describe the processor and the versions that a measurement depends on."""
    import torch
    import transformers

    from stream_generator.model.processor import describe

    return {
        "processor": processor(),
        "kind": describe(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor() -> str:
    """Name the processor. On Linux only /proc/cpuinfo has the full name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_report(name: str, report: dict[str, Any]) -> str:
    """Write a report, with the machine, to results/NAME.json. Return the JSON text."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), **report}, indent=1, default=str)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    return text


def run_script(script: str, *arguments: str) -> Any:
    """Run a Python script in its own process. Decode the last line of its output as JSON."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def median_low_high(values: Sequence[float], digits: int | None = None) -> list[float]:
    """Return the median, the lowest and the highest value, rounded if `digits` is given."""
    figures = [statistics.median(values), min(values), max(values)]
    return figures if digits is None else [round(figure, digits) for figure in figures]


def spread(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return median, lowest and highest value of each figure over several runs."""
    return {name: median_low_high([run[name] for run in runs]) for name in runs[0]}


def table(
    labels: str,
    columns: Collection[str],
    rows: Mapping[str, Mapping[str, list[float]]],
    titles: Iterable[str] | None = None,
    cell: str = "{:g} ({:g} to {:g})",
) -> str:
    """Format medians, with lowest and highest values, as a Markdown table.

    `labels` begins the header, and each key of `rows` begins a row; both may span several columns.
    `columns` selects the figures. `titles` replaces the names of the figures in the header.
    """
    header = f"{labels} | " + " | ".join(titles or columns) + " |"
    lines = [header, "|---" * (header.count("|") - 1) + "|"]
    for label, figures in rows.items():
        cells = [cell.format(*figures[name]) for name in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@contextmanager
def chart(
    path: Path, size: tuple[float, float], rect: Sequence[float] | None = None, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Open a figure with its axes. Save the figure when the block ends.

    `rect` is the part of the figure for the axes; `options` go to `pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, **options)
    yield figure, axes
    figure.tight_layout(rect=rect)
    figure.savefig(path, dpi=130)
