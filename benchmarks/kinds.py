"""How fast is the service on each kind of processor, with packed weights and with dense ones?

    pip install -r benchmarks/requirements.txt
    python benchmarks/kinds.py --kinds AVX512 AVX2 --before ../an-older-checkout

A processor can do what its predecessors could: `--kinds` limits PyTorch and oneDNN to the
instructions of another kind, by their own variables. Its clock, caches and memory stay as they are,
so such figures are ratios for that kind and not its speed. ONNX Runtime, which computes packed
weights, has no such variable: the limits hold for dense weights alone. Real HTTP clients, all
variants in turn, several rounds. Writes benchmarks/results/NAME.json and prints a table.
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

from late_tokens import RESULTS, ROOT, machine
from serve import Load, Request, Service, spread

LIMITS = {
    "AVX512": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
COLUMNS = ["total_tok_s", "one_tok_s", "ttft_p50_s", "gap_p50_s", "memory_gb"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=LIMITS, default=["AVX2"])
    parser.add_argument("--quantize", nargs="+", default=["auto", "none"])
    parser.add_argument("--before", type=Path, help="another checkout, measured with auto")
    parser.add_argument("--users", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="kinds")
    args = parser.parse_args()
    args.pause, args.long_prompt = 0.0, 0  # as `Load` reads them
    variants: dict[str, tuple[Path, str]] = {q: (ROOT, q) for q in args.quantize}
    if args.before:
        variants["before, auto"] = (args.before, "auto")
    runs: dict[str, list[dict[str, float]]] = {}
    for number in range(args.rounds):
        for kind in args.kinds:
            os.environ.update(LIMITS[kind])
            in_turn = [*variants.items()]
            in_turn = in_turn[number % len(in_turn) :] + in_turn[: number % len(in_turn)]
            for variant, (checkout, quantize) in in_turn:
                with Service("ours", "--quantize", quantize, root=checkout) as service:
                    service.ask(Request("Hello.", 4))
                    for users in args.users:
                        load = Load(service, args, random.Random(number))
                        load.run_closed(users)
                        name = f"{kind} | {variant} | {users}"
                        runs.setdefault(name, []).append(load.figures())
                        print(f"round {number + 1}, {name}: {runs[name][-1]}", flush=True)
            for variable in LIMITS[kind]:
                del os.environ[variable]
    middle = {name: spread(figures) for name, figures in runs.items()}
    report = {
        "machine": machine(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "limits": {kind: LIMITS[kind] for kind in args.kinds},
        "median_low_high": middle,
        "rounds": runs,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print_table(middle)


def print_table(middle: dict[str, dict[str, Any]]) -> None:
    print("| kind | --quantize | users | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for name, figures in middle.items():
        cells = ["{:g} ({:g} to {:g})".format(*figures[column]) for column in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
