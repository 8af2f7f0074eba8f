"""The chat page's parts: conversations, what is shown of them, and the words it uses."""
