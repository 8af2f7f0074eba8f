"""How much memory is resident (Linux) when eight slots of 2,048 tokens are full?

    python benchmarks/memory.py

Eight chats of about 2,000 tokens each, at the same time, after a start with `--max-concurrent 8
--max-context 2048`. Writes benchmarks/results/memory.json.
"""

import functools
import json
import threading
from collections.abc import Callable

import psutil
from compare import FILLER
from late_tokens import RESULTS, machine
from serve import Request, Service

SLOTS, CONTEXT, REPEATS = 8, 2048, 120


def main() -> None:
    sizes_wanted = ("--max-concurrent", str(SLOTS), "--max-context", str(CONTEXT))
    with Service("ours", *sizes_wanted) as service:
        sizes = {"started": service.memory_gb()}
        service.ask(Request("Hello.", 4))
        sizes["after a first reply"] = service.memory_gb()
        # Different beginnings: nothing is shared between the slots.
        asked = [Request(f"Text {n}: {FILLER * REPEATS}", 64) for n in range(SLOTS)]
        together([functools.partial(service.ask, request) for request in asked])
        assert all(request.tokens for request in asked), [request.error for request in asked]
        sizes["all slots full"] = service.memory_gb()
        anonymous = service.anonymous_gb()
    report = {
        "machine": machine(),
        "slots": SLOTS,
        "context": CONTEXT,
        # 30 layers, 3 heads of keys and 3 of values, of 64 numbers of 4 bytes
        "keys_and_values_gb": round(SLOTS * CONTEXT * 30 * 6 * 64 * 4 / 1e9, 3),
        "anonymous_when_full_gb": round(anonymous, 3),
        "resident_gb": {name: round(size, 3) for name, size in sizes.items()},
        "of_the_machine_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }
    (RESULTS / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def together(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
