// Replace a number out of its field's bounds by the nearest bound, and show the bounds in a line.
// Gradio would fail on such a number. A field without a slider may be empty: the model's default.
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
  // Gradio reads a slider when the pointer releases it, and ignores keys.
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
