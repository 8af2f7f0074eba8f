"""Chat in the terminal with the `openai` client.

Install the client (`pip install openai`), start the service (`python llama3_service.py`), then run:

    python examples/openai_chat.py

An empty line ends the chat. The environment variables LLAMA3_ADDRESS and LLAMA3_API_KEY select
another service and its key.
"""

import os

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

ADDRESS = os.environ.get("LLAMA3_ADDRESS", "http://localhost:8800")


def main() -> None:
    client = OpenAI(base_url=f"{ADDRESS}/v1", api_key=os.environ.get("LLAMA3_API_KEY", "none"))
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = []  # each request sends the whole conversation
    while question := input("> "):
        messages.append({"role": "user", "content": question})
        answer = ""
        for chunk in client.chat.completions.create(model=model, messages=messages, stream=True):
            delta = chunk.choices[0].delta.content or ""
            print(delta, end="", flush=True)
            answer += delta
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
