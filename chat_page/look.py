"""What the page looks like. Nothing of it comes from elsewhere: no web fonts, no CDN."""

from pathlib import Path

import gradio as gr

ASSETS = Path(__file__).parent / "assets"

THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "DejaVu Sans Mono", "monospace"],
    radius_size="md",
)
STYLE = (ASSETS / "page.css").read_text()

# The browser itself refuses what would come from another server, whatever a model writes.
# (Gradio's own scripts and templates need the inline and the evaluated ones.)
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
HEAD = (
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    f"<script>{(ASSETS / 'page.js').read_text()}</script>"
)
