"""Measure the memory of the service when eight slots of 2,048 tokens are full (Linux).

    python benchmarks/memory.py

Starts the service with `--max-concurrent 8 --max-context 2048` and sends eight chats of about 2,000
tokens at once. Writes benchmarks/results/memory.json.
"""

from concurrent.futures import ThreadPoolExecutor

import common
import psutil
from systems import Request, Service

SLOTS, CONTEXT, REPEATS = 8, 2048, 120


def main() -> None:
    flags = ("--max-concurrent", str(SLOTS), "--max-context", str(CONTEXT))
    with Service("ours", *flags) as service:
        sizes = {"started": service.memory_gb()}
        service.ask(Request("Hello.", 4))
        sizes["after a first reply"] = service.memory_gb()
        # The texts begin differently, so no slot reuses the keys of another slot.
        asked = [Request(f"Text {n}: {common.FILLER * REPEATS}", 64) for n in range(SLOTS)]
        with ThreadPoolExecutor(SLOTS) as pool:
            list(pool.map(service.ask, asked))
        assert all(request.tokens for request in asked), [request.error for request in asked]
        sizes["all slots full"] = service.memory_gb()
        anonymous = service.anonymous_gb()
    report = {
        "slots": SLOTS,
        "context": CONTEXT,
        # 30 layers; 3 heads of keys and 3 heads of values per layer; 64 numbers of 4 bytes per head
        "keys_and_values_gb": round(SLOTS * CONTEXT * 30 * 6 * 64 * 4 / 1e9, 3),
        "anonymous_when_full_gb": round(anonymous, 3),
        "resident_gb": {name: round(size, 3) for name, size in sizes.items()},
        "of_the_machine_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }
    print(common.write_report("memory", report))


if __name__ == "__main__":
    main()
