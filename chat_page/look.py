"""Theme, style and scripts of the page. All come from this server: no web fonts, no CDN."""

import json
from pathlib import Path

import gradio as gr

from chat_page.words import texts

ASSETS = Path(__file__).parent / "assets"

THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "DejaVu Sans Mono", "monospace"],
    radius_size="md",
).set(  # Gradio's own colours have too little contrast
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
    button_primary_text_color="white",
)
STYLE = (ASSETS / "page.css").read_text()
# Scripts of the whole page. `parts.py` has the scripts of single components.
SCRIPT = "\n".join(
    (ASSETS / f"{name}.js").read_text()
    for name in ("common", "conversations", "box", "follow", "copying", "numbers", "labels")
)

# This policy stops the browser from loading anything from other servers, whatever a model writes.
# Gradio's own scripts and templates need 'unsafe-inline' and 'unsafe-eval'.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
WORDS = texts("you", "model", "edit", "send", "halt", "conversations", "settings", "between")
HEAD = (
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    f"<script>window.pageWords = {json.dumps(WORDS)};\n{SCRIPT}</script>"
)
