"""The flags of the command, grouped by what they are for, and checked."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

from stream_service import __version__
from stream_service.loopback import is_loopback
from stream_service.settings import LOOPBACK_NAMES, MAX_BODY_BYTES, Settings

Add = Callable[..., argparse.Action]  # `add_argument` of a group
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. `settings` is made of what concerns HTTP."""
    parser = argparse.ArgumentParser(
        description="Stream the replies of a language model, token by token, over HTTP."
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"%(prog)s {__version__}",
        help="print the version and exit",
    )
    groups = {
        "the model": _add_model,
        "how it is computed": _add_computing,
        "where it listens": _add_address,
        "who may ask": _add_access,
        "how much it takes on": _add_limits,
        "its log": _add_log,
    }
    for name, add_flags in groups.items():
        add_flags(parser.add_argument_group(name).add_argument)
    args = parser.parse_args(arguments)
    if args.device and args.device_map:
        parser.error("--device and --device-map exclude each other; give one")
    args.is_loopback = is_loopback(args.host)
    try:
        args.settings = _settings(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


def _add_model(add: Add) -> None:
    add(
        "-c",
        "--ckpts",
        metavar="MODEL",
        help="directory in Hugging Face format or as Meta distributes Llama, .gguf file, or hub "
        "id, also as id@revision and id:file.gguf (a small demo model)",
    )
    add("--served-model-name", metavar="NAME", help="what it is called in answers (its own name)")
    add(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="of dense weights; auto: bfloat16 where the device is fast at it or float32 has no "
        "room, else float32 (%(default)s)",
    )
    add(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda or cuda:1 (all GPUs there are, else the CPU)",
    )
    add(
        "--device-map",
        type=_device_map,
        metavar="MAP",
        help="how a large model is spread over GPUs and the CPU: auto, balanced, sequential, or a "
        "JSON file with a device for each module",
    )
    add(
        "--allow-pickle",
        action="store_true",
        help="read pickled weights where there are no others, as plain tensors",
    )
    add(
        "--cache",
        nargs="*",
        metavar="NAME",
        help="list what is kept of models on this machine, or delete these entries, and end",
    )


def _add_computing(add: Add) -> None:
    add(
        "--quantize",
        choices=["auto", "none", "int8", "int4"],
        default="auto",
        help="bits of each weight; auto: as the checkpoint has them (%(default)s)",
    )
    add(
        "--reproducible",
        action="store_true",
        help="give the same bytes for the same request, also with a warm prefix cache: reuse "
        "only what a prompt has computed (packed weights on a CPU)",
    )
    add(
        "--threads",
        type=_positive,
        metavar="N",
        help="threads that compute (the physical cores that the process may use, or what "
        "OMP_NUM_THREADS says)",
    )


def _add_address(add: Add) -> None:
    add("-H", "--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("-P", "--port", type=_port, default=8800, help="port to listen on (%(default)s)")
    add("--app", action="store_true", help="start the chat page too")
    add("--app-port", type=_port, default=7860, help="port of the chat page (%(default)s)")


def _add_access(add: Add) -> None:
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="ask for this key, as Authorization: Bearer KEY; may be given several times. Others "
        "on the machine can read a command line: LLAMA3_API_KEY or --api-key-file are better",
    )
    add("--api-key-file", type=Path, metavar="FILE", help="keys, one a line")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer to this name too (on a loopback address: localhost alone; else any)",
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin ask from a browser; may be given several times (none)",
    )


def _add_limits(add: Add) -> None:
    add(
        "--max-concurrent",
        type=_positive,
        metavar="N",
        help="requests that are served at the same time (as the memory allows, at most 32)",
    )
    add(
        "--max-context",
        type=_positive,
        metavar="TOKENS",
        help="prompt and reply together (the model's own limit, if the memory allows)",
    )
    add(
        "--max-queue",
        type=_positive,
        default=32,
        metavar="N",
        help="requests that may wait; one more gets status 429 (%(default)s)",
    )
    add(
        "--max-body",
        type=_positive,
        default=MAX_BODY_BYTES,
        metavar="BYTES",
        help="size of a request's body; more gets status 413 (%(default)s)",
    )
    add(
        "--max-time",
        type=_seconds,
        metavar="SECONDS",
        help="for each request: a reply ends then with finish reason length (no limit)",
    )
    add(
        "--drain",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="time for open streams to finish when the service is ended (30)",
    )


def _add_log(add: Add) -> None:
    add("--log-json", action="store_true", help="write each line of the log as JSON")


def _settings(args: argparse.Namespace) -> Settings:
    keys = [*args.api_key]
    if (from_environment := os.environ.get("LLAMA3_API_KEY")) is not None:
        if not from_environment.strip():
            raise ValueError("LLAMA3_API_KEY is set but empty; give it a key, or unset it")
        keys.append(from_environment)
    if args.api_key_file is not None:
        in_file = args.api_key_file.read_text().split()
        if not in_file:
            raise ValueError(f"there is no key in {args.api_key_file}")
        keys += in_file
    hosts = {name.lower() for name in args.allow_host}
    if hosts or args.is_loopback:
        hosts |= LOOPBACK_NAMES  # the page, and those who watch over it from this machine
    if args.is_loopback:
        hosts.add(args.host)
    return Settings(
        api_keys=tuple(key.strip() for key in keys),
        allowed_hosts=frozenset(hosts) or None,
        cors_origins=tuple(args.cors_origin),
        max_body=args.max_body,
    )


def _port(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; use 0 to 65535")
    return value


def _device_map(text: str) -> str | dict[str, str | int]:
    if text in DEVICE_MAPS:
        return text
    try:
        devices = json.loads(Path(text).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text} is none of {', '.join(DEVICE_MAPS)}, and no JSON file ({error})"
        ) from error
    if not isinstance(devices, dict) or not all(
        isinstance(device, (str, int)) for device in devices.values()
    ):
        raise argparse.ArgumentTypeError(
            f'{text} must hold an object such as {{"model": "cuda:0"}}'
        )
    return devices


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value
