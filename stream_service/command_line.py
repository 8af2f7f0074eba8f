"""The command-line flags of the service: groups, help texts and checks."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

from stream_service import __version__
from stream_service.loopback import is_loopback
from stream_service.settings import LOOPBACK_NAMES, MAX_BODY_BYTES, ServiceSettings

Add = Callable[..., argparse.Action]  # `add_argument` of a group
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and add `settings` (of the HTTP layer) and `is_loopback`."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.device and args.device_map:
        parser.error("--device and --device-map cannot be combined; use one of them")
    args.is_loopback = is_loopback(args.host)
    try:
        args.settings = _settings(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


def make_parser() -> argparse.ArgumentParser:
    """Create the parser. Each help text ends with its default, for `docs/generate.py`."""
    parser = argparse.ArgumentParser(
        description="Serve a language model over HTTP and stream each reply token by token."
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"%(prog)s {__version__}",
        help="print the version and exit",
    )
    groups = {
        "model": _add_model,
        "computation": _add_computation,
        "network": _add_network,
        "access": _add_access,
        "limits": _add_limits,
        "logging": _add_logging,
    }
    for name, add_flags in groups.items():
        add_flags(parser.add_argument_group(name).add_argument)
    return parser


def _add_model(add: Add) -> None:
    add(
        "-c",
        "--ckpts",
        metavar="MODEL",
        help="the model to serve: a directory in Hugging Face format or in Meta's Llama format, a "
        ".gguf file, or a hub id (also id@revision and id:file.gguf) "
        "(default: a small demo model)",
    )
    add(
        "--served-model-name",
        metavar="NAME",
        help="the name of the model in responses (default: the name of the checkpoint)",
    )
    add(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="data type of dense weights. auto selects bfloat16 if the device is fast at bfloat16, "
        "or if the weights in float32 need more than 80 %% of the free memory; else float32. "
        "Packed weights on a CPU accept only auto and float32 (default: %(default)s)",
    )
    add(
        "--device",
        metavar="DEVICE",
        help="load the model on this device: cpu, cuda or cuda:1 (default: all GPUs, or the CPU "
        "if there is no GPU)",
    )
    add(
        "--device-map",
        type=_device_map,
        metavar="MAP",
        help="distribute a large model over the GPUs and the CPU: auto, balanced, balanced_low_0, "
        "sequential, or a JSON file that assigns a device to each module (default: none)",
    )
    add(
        "--allow-pickle",
        action="store_true",
        help="read pickled weights if the checkpoint has no other weights. Only plain tensors are "
        "read, and no code runs (default: off)",
    )
    add(
        "--check",
        action="store_true",
        help="load the model as a start would, print what would be served and exit, with status 0, "
        "or with status 1 and the reason why the service cannot start (default: off)",
    )
    add(
        "--cache",
        nargs="*",
        metavar="NAME",
        help="list the cached models with their sizes and exit. With names: delete these models "
        "from the cache and exit",
    )


def _add_computation(add: Add) -> None:
    add(
        "--quantize",
        choices=["auto", "none", "int8", "int4"],
        default="auto",
        help="number of bits per weight. int8 and int4 pack the weights of Llama, Mistral, Qwen2 "
        "and Qwen3 models, and reject other architectures. auto packs weights only if the file "
        "has packed weights. For a CPU, packed weights are cached (default: %(default)s)",
    )
    add(
        "--reproducible",
        action="store_true",
        help="return the same bytes for the same request with the same seed or temperature 0: the "
        "service reuses only keys and values that were computed for prompts. Requires packed "
        "weights on a CPU (default: off)",
    )
    add(
        "--threads",
        type=_positive,
        metavar="N",
        help="number of computing threads (default: OMP_NUM_THREADS, or the number of physical "
        "cores that the process may use)",
    )


def _add_network(add: Add) -> None:
    add(
        "-H",
        "--host",
        default="127.0.0.1",
        help="address to listen on. Read docs/deployment.md before you choose an address that "
        "other machines can reach (default: %(default)s)",
    )
    add("-P", "--port", type=_port, default=8800, help="port to listen on (default: %(default)s)")
    add("--app", action="store_true", help="also start the chat page (default: off)")
    add(
        "--app-port",
        type=_port,
        default=7860,
        help="port of the chat page (default: %(default)s)",
    )


def _add_access(add: Add) -> None:
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="require this key, as the header Authorization: Bearer KEY. Repeat the flag for more "
        "keys. Other users of the machine can read a command line, so LLAMA3_API_KEY or "
        "--api-key-file is safer (default: none)",
    )
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="read keys from this file, one per line (default: none)",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="accept requests for this host name too. Repeat the flag for more names (default: "
        "only localhost if the service listens on a loopback address, else every name)",
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="accept requests that pages of this origin send from a browser. Repeat the flag for "
        "more origins (default: none)",
    )


def _add_limits(add: Add) -> None:
    add(
        "--max-concurrent",
        type=_positive,
        metavar="N",
        help="maximum number of requests that run at the same time (default: as many as the "
        "memory holds, at most 32)",
    )
    add(
        "--max-context",
        type=_positive,
        metavar="TOKENS",
        help="maximum length of prompt and reply together (default: the limit of the model, or "
        "less if the memory is too small for that)",
    )
    add(
        "--max-queue",
        type=_positive,
        default=32,
        metavar="N",
        help="maximum number of waiting requests; further requests get status 429 "
        "(default: %(default)s)",
    )
    add(
        "--max-body",
        type=_positive,
        default=MAX_BODY_BYTES,
        metavar="BYTES",
        help="maximum size of a request body; a larger body gets status 413 (default: %(default)s)",
    )
    add(
        "--max-time",
        type=_seconds,
        metavar="SECONDS",
        help='maximum time for a request; its reply then ends with finish reason "length" '
        "(default: no limit)",
    )
    add(
        "--drain",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="time for open streams to finish after Ctrl-C or SIGTERM (default: 30)",
    )


def _add_logging(add: Add) -> None:
    add("--log-json", action="store_true", help="write log lines as JSON (default: off)")


def _settings(args: argparse.Namespace) -> ServiceSettings:
    keys = [*args.api_key]
    if (from_environment := os.environ.get("LLAMA3_API_KEY")) is not None:
        if not from_environment.strip():
            raise ValueError("LLAMA3_API_KEY is empty; set it to a key, or unset it")
        keys.append(from_environment)
    if args.api_key_file is not None:
        in_file = args.api_key_file.read_text().split()
        if not in_file:
            raise ValueError(f"{args.api_key_file} contains no key; write one key per line")
        keys += in_file
    hosts = {name.lower() for name in args.allow_host}
    if hosts or args.is_loopback:
        hosts |= LOOPBACK_NAMES  # for the page, and for monitoring on this machine
    if args.is_loopback:
        hosts.add(args.host)
    return ServiceSettings(
        api_keys=tuple(key.strip() for key in keys),
        allowed_hosts=frozenset(hosts) or None,
        cors_origins=tuple(args.cors_origin),
        max_body=args.max_body,
    )


def _port(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; use a number from 0 to 65535")
    return value


def _device_map(text: str) -> str | dict[str, str | int]:
    if text in DEVICE_MAPS:
        return text
    try:
        devices = json.loads(Path(text).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text} is neither {', '.join(DEVICE_MAPS)} nor a readable JSON file ({error})"
        ) from error
    if not isinstance(devices, dict) or not all(
        isinstance(device, (str, int)) for device in devices.values()
    ):
        raise argparse.ArgumentTypeError(
            f'{text} must contain a JSON object such as {{"model": "cuda:0"}}'
        )
    return devices


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer; use 1 or more")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds; use 0 to 1000000")
    return value
