"""The chat page: a Gradio application that talks to the service over HTTP."""
