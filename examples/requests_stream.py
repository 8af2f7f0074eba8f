"""Stream a reply with `requests` and print each piece of text when it arrives.

Start the service (`python llama3_service.py`), then run:

    python examples/requests_stream.py "Explain how a rainbow forms."

The environment variables LLAMA3_ADDRESS and LLAMA3_API_KEY select another service and its key.
"""

import os
import sys

import requests

ADDRESS = os.environ.get("LLAMA3_ADDRESS", "http://localhost:8800")
API_KEY = os.environ.get("LLAMA3_API_KEY")


def main(question: str) -> None:
    headers = {"Authorization": f"Bearer {API_KEY}"} if API_KEY else {}
    body = {"query": question, "max_new_tokens": 200}
    with requests.post(f"{ADDRESS}/stream", json=body, headers=headers, stream=True) as reply:
        if not reply.ok:
            sys.exit(reply.json()["error"]["message"])
        reply.encoding = "utf-8"
        # If the service fails in the middle of a reply, this loop raises an exception.
        for text in reply.iter_content(None, decode_unicode=True):
            print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "Explain how a rainbow forms.")
