"""Measure the service with the instructions of several kinds of processor.

    pip install -r benchmarks/requirements.txt
    python benchmarks/kinds.py --kinds AVX512 AVX2 --before ../an-older-checkout

`--kinds` limits PyTorch and oneDNN to the instructions of a kind, through their environment
variables. The clock, caches and memory stay those of this machine: use the figures as ratios
between variants, not as the speed of such a processor. ONNX Runtime computes packed weights and has
no such variable, so the limits apply to dense weights only.

Each round measures packed weights, dense weights and the other checkout in turn, over HTTP. Writes
benchmarks/results/NAME.json and prints a table.
"""

import os
from pathlib import Path

import common
from serve import Load
from systems import Request, Service

LIMITS = {
    "AVX512": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
COLUMNS = ["total_tok_s", "one_tok_s", "ttft_p50_s", "gap_p50_s", "memory_gb"]


def main() -> None:
    parser = common.parser_for(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=LIMITS, default=["AVX2"])
    parser.add_argument("--quantize", nargs="+", default=["auto", "none"])
    parser.add_argument("--before", type=Path, help="another checkout to measure with auto")
    parser.add_argument("--users", nargs="+", type=int, default=[1, 4, 8])
    args = common.add_flags(parser, seconds=10.0, rounds=3, name="kinds").parse_args()
    variants: dict[str, tuple[Path, str]] = {q: (common.ROOT, q) for q in args.quantize}
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
                    service.ask(Request("Hello.", 4))  # warm up
                    for users in args.users:
                        name = f"{kind} | {variant} | {users}"
                        figures = Load(service, args.seconds, number).closed(users)
                        runs.setdefault(name, []).append(figures)
                        print(f"round {number + 1}, {name}: {figures}", flush=True)
            for variable in LIMITS[kind]:
                del os.environ[variable]
    medians = {name: common.spread(figures) for name, figures in runs.items()}
    report = {
        "settings": {**vars(args), "pause": 0.0, "long_prompt": 0},
        "limits": {kind: LIMITS[kind] for kind in args.kinds},
        "median_low_high": medians,
        "rounds": runs,
    }
    common.write_report(args.name, report)
    print(common.table("| kind | --quantize | users", COLUMNS, medians))


if __name__ == "__main__":
    main()
