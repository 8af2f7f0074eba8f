"""The chat page: a Gradio view of the service's stream.

    python llama3_app.py        or        gradio llama3_app.py

It reaches the service over HTTP alone, at LLAMA3_ADDRESS or else ADDRESS, with LLAMA3_API_KEY if
there is one.
"""

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from stream_service.client import StreamClient, StreamError

ADDRESS = "http://127.0.0.1:8800"


def reply(message: str, history: list[dict[str, Any]], system_prompt: str | None) -> Iterator[str]:
    """The model's reply to `message`, longer with each delta."""
    conversation = [{"role": turn["role"], "content": turn["content"]} for turn in history]
    if system_prompt and system_prompt.strip():  # Gradio sends None for a box never touched
        conversation.insert(0, {"role": "system", "content": system_prompt})
    conversation.append({"role": "user", "content": message})
    client = StreamClient(
        os.environ.get("LLAMA3_ADDRESS", ADDRESS), api_key=os.environ.get("LLAMA3_API_KEY")
    )
    text = ""
    try:
        with client.stream(conversation) as deltas:
            for delta in deltas:
                text += delta
                yield text
    except StreamError as error:
        yield f"{text}\n\n⚠️ {_sentence(error, client.url)}".strip()


def _sentence(error: StreamError, address: str) -> str:
    """What went wrong and what to do, for a person."""
    if error.status is None and not error.text:
        return f"The service at {address} is not there. Start llama3_service.py, then try again."
    if error.status is None:
        return "The connection to the service was lost in the middle of the reply. Try again."
    return f"The service could not reply: {error}"


demo = gr.ChatInterface(
    reply,
    title="Llama 3, streamed",
    chatbot=gr.Chatbot(show_label=False, buttons=["copy"], height="70vh"),
    additional_inputs=[
        gr.Textbox(label="System prompt", placeholder="You are a helpful assistant.", lines=2)
    ],
    additional_inputs_accordion=gr.Accordion("Settings", open=False),
    api_name="chat",
    concurrency_limit=None,  # visitors do not wait for each other
    flagging_mode="never",
    analytics_enabled=False,
)

if __name__ == "__main__":
    demo.launch(footer_links=["gradio", "settings"])
