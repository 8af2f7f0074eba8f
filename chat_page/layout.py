"""The components of the page and their arrangement."""

import gradio as gr

from chat_page import parts
from chat_page.controls import Controls
from chat_page.markup import LATEX_DELIMITERS
from chat_page.words import TEXTS, i18n


class Layout:
    """All components, inside one `gr.Blocks`.

    `service`, `event_queue`, `tokens` and `saved_file` are invisible. They hold one user's values.
    """

    def __init__(self) -> None:
        with gr.Blocks(
            title=TEXTS["title"][0], analytics_enabled=False, fill_height=True
        ) as self.blocks:
            self.service = gr.State(None)  # `About`, once the service has answered
            self.event_queue = parts.event_queue()  # the id of the reply that is being written
            self.tokens = gr.State(())  # of the last reply
            self.saved_file = parts.download()
            with gr.Sidebar(width=280, elem_id="left"):
                self.new = gr.Button(i18n("new"), variant="primary")
                self.conversation_list = parts.conversation_list()
                with gr.Row():
                    self.as_markdown = gr.Button(i18n("export_markdown"), size="sm", min_width=80)
                    self.as_json = gr.Button(i18n("export_json"), size="sm", min_width=80)
            with gr.Sidebar(position="right", open=False, width=320, elem_id="right"):
                self.with_tokens = gr.Checkbox(
                    label=i18n("token_view"), info=i18n("token_view_info"), container=False
                )
                self.controls = Controls()
            self._add_chat()

    def _add_chat(self) -> None:
        """The middle of the page: the model, the conversation, its tokens and the message box."""
        self.status = gr.HTML(elem_id="status")
        self.chat = gr.Chatbot(
            show_label=False,
            label=i18n("chat"),
            buttons=["copy"],
            editable="user",
            layout="panel",
            group_consecutive_messages=False,
            latex_delimiters=LATEX_DELIMITERS,
            feedback_options=None,
            scale=1,
            autoscroll=False,  # `follow.js` scrolls instead, unless the user scrolls up
            elem_id="chat",
        )
        with gr.Group(visible="hidden", elem_id="tokens") as self.token_panel:
            self.token_view = parts.token_view()
        self.box = gr.Textbox(
            placeholder=i18n("ask"),
            label=i18n("message"),
            show_label=False,
            submit_btn=True,
            lines=1,
            max_lines=10,
            autofocus=True,
            elem_id="box",
        )
