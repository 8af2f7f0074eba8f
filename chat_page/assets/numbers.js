// A number outside of its field's bounds becomes the nearest of them, before Gradio sees it and
// fails; a line says so. An empty field is the model's own choice, where there is no slider.
(() => {
  const field = ({ target }) => (target.matches?.("#right input[type=number]") ? target : null);
  const { early, language, make } = window.common;

  early("focus", (event) => {
    const input = field(event);
    if (!input) return;
    input.dataset.before = input.value;
    input.closest(".block").querySelector(".between")?.remove();
  });
  early("keydown", (event) => event.key === "Enter" && field(event)?.blur());
  // Gradio takes a slider's value when the pointer leaves it, and knows no keys.
  early("keyup", ({ target }) => {
    if (!target.matches?.("#right input[type=range]")) return;
    target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  });
  early("blur", (event) => {
    const input = field(event);
    if (!input) return;
    const { min, max, value, dataset } = input;
    const isSlider = input.closest(".block").querySelector("[type=range]");
    if (!value && (input.validity.badInput || isSlider)) input.value = dataset.before;
    else if (value && min !== "" && +value < +min) input.value = min;
    else if (value && max !== "" && +value > +max) input.value = max;
    else return;
    input.dispatchEvent(new Event("input", { bubbles: true }));
    const text = window.pageWords[language].between;
    const bounds = text.replace("{least}", min).replace("{greatest}", max);
    input.closest(".block").append(make("p", { class: "between", role: "status" }, bounds));
  });
})();
