"""Stream a reply in this process, without a service.

Install the package (`pip install .`), then run:

    python examples/local_stream.py                     # the demo model
    python examples/local_stream.py MODEL "A question"

MODEL is a directory, a .gguf file or a hub id, as for `python llama3_service.py --ckpts`.
"""

import sys

from stream_generator import load_checkpoint, stream_generate


def main(model: str | None = None, question: str = "Name three colours.") -> None:
    checkpoint = load_checkpoint(model)
    messages = [{"role": "user", "content": question}]
    for output in stream_generate(checkpoint, messages, max_new_tokens=200, temperature=0):
        print(output.delta, end="", flush=True)
    print(f"\n({output.finish_reason})")


if __name__ == "__main__":
    main(*sys.argv[1:])
