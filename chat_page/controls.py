"""The settings panel, with the bounds and defaults that the service publishes."""

from typing import Any

import gradio as gr
from pydantic import Field

from chat_page.conversation import ChatSettings, Count, Line, Record
from chat_page.words import PRESETS, i18n, preset_of

NUMBERS = [name for name in ChatSettings.model_fields if name not in ("system_prompt", "stop")]
# Defaults of settings that the model's own defaults do not name.
NEUTRAL = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
}
STEPS = {"temperature": 0.05, "top_p": 0.01, "min_p": 0.01, "repetition_penalty": 0.01}
LARGEST_EXACT = 2**53 - 1  # up to here, JavaScript represents every integer exactly


class About(Record):
    """The service's answer to `GET /`, as far as the page needs it."""

    model: Line
    context_length: Count
    defaults: dict[str, Any] = Field(default_factory=dict)
    bounds: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def default(self, name: str) -> Any:
        return self.defaults.get(name, NEUTRAL.get(name))

    def range(self, name: str) -> dict[str, float]:
        """Minimum and maximum as arguments for a component; empty if the bounds are unknown."""
        if name not in self.bounds:
            return {}
        bounds = self.bounds[name]
        least = bounds.get("minimum", bounds.get("exclusiveMinimum", 0) + STEPS.get(name, 0))
        greatest = bounds.get("maximum", LARGEST_EXACT)
        if name in ("min_new_tokens", "max_new_tokens"):
            greatest = min(greatest, self.context_length)
        return {"minimum": least, "maximum": min(greatest, LARGEST_EXACT)}


class Controls:
    """The components of the panel."""

    def __init__(self) -> None:
        choices = [(i18n(name), name) for name in PRESETS]
        self.preset = gr.Dropdown(
            choices, value="preset_none", label=i18n("preset"), filterable=False
        )
        self.system_prompt = gr.Textbox(
            label=i18n("system_prompt"),
            placeholder=i18n("system_prompt_hint"),
            lines=3,
            max_lines=10,
        )
        self.temperature = _slider("temperature", 0, 2, info=i18n("temperature_info"))
        self.top_p = _slider("top_p", 0.01, 1)
        self.min_p = _slider("min_p", 0, 1)
        self.repetition_penalty = _slider("repetition_penalty", 0.01, 2)
        with gr.Row():
            self.min_new_tokens = _number("min_new_tokens")
            self.max_new_tokens = _number("max_new_tokens")
        with gr.Row():
            self.top_k = _number("top_k", info=i18n("top_k_info"))
            self.seed = _number("seed", info=i18n("seed_info"))
        self.stop = gr.Textbox(label=i18n("stop"), info=i18n("stop_info"), lines=2)
        self.reset = gr.Button(i18n("reset"), size="sm")

    @property
    def fields(self) -> dict[str, gr.components.Component]:
        """The component of each setting, in the order of the fields of `ChatSettings`."""
        return {name: getattr(self, name) for name in ChatSettings.model_fields}

    def updates(self, settings: ChatSettings, about: About | None) -> dict[Any, Any]:
        """The updates that show these settings, and the service's defaults for unset ones.

        Number fields are disabled while the bounds are unknown.
        """
        shown: dict[Any, Any] = {
            self.preset: preset_of(settings.system_prompt),
            self.system_prompt: settings.system_prompt,
            self.stop: "\n".join(settings.stop),
        }
        if about is None:
            return shown | {self.fields[name]: gr.update(interactive=False) for name in NUMBERS}
        fitted = clamp(settings, about)
        for name in NUMBERS:
            value = getattr(fitted, name)
            value = about.default(name) if value is None else value
            shown[self.fields[name]] = gr.update(value=value, interactive=True, **about.range(name))
        return shown

    @property
    def shown(self) -> list[gr.components.Component]:
        """The components that `updates` may change."""
        return [self.preset, *self.fields.values()]


def clamp(settings: ChatSettings, about: About) -> ChatSettings:
    """Replace each number that is out of the service's bounds by the nearest valid one."""
    nearest = {}
    for name in NUMBERS:
        value, bounds = getattr(settings, name), about.range(name)
        if value is not None and bounds:
            nearest[name] = min(max(value, bounds["minimum"]), bounds["maximum"])
    return settings.model_copy(update=nearest)


def settings_of(values: tuple[Any, ...], about: About | None, before: ChatSettings) -> ChatSettings:
    """Read the settings from the components' values. Values equal to the default stay unset.

    before: the settings so far. Without `about` the number fields are disabled, so the numbers of
    `before` stay.
    """
    chosen = dict(zip(ChatSettings.model_fields, values, strict=True))
    stop = tuple(line for line in (chosen.pop("stop") or "").splitlines() if line)
    prompt = chosen.pop("system_prompt") or ""
    if about is None:
        return before.model_copy(update={"system_prompt": prompt, "stop": stop})
    chosen = {name: value for name, value in chosen.items() if value != about.default(name)}
    return ChatSettings(system_prompt=prompt, stop=stop, **chosen)


def _slider(name: str, least: float, greatest: float, **options: Any) -> gr.Slider:
    # Gradio's reset button is off: it would restore the value from before the service answered.
    return gr.Slider(
        least,
        greatest,
        step=STEPS[name],
        label=i18n(name),
        buttons=[],
        interactive=False,
        **options,
    )


def _number(name: str, **options: Any) -> gr.Number:
    return gr.Number(label=i18n(name), precision=0, min_width=100, interactive=False, **options)
