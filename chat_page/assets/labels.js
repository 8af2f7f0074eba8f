// Labels for screen readers. Gradio labels a message with its whole text, HTML included, and leaves
// some buttons without a label. Here a message's label is its speaker, and each button has one.
(() => {
  const words = () => window.pageWords?.[document.documentElement.lang] ?? {};
  const label = (selector, text) => {
    for (const found of document.querySelectorAll(selector)) {
      if (text && found.getAttribute("aria-label") !== text) found.setAttribute("aria-label", text);
    }
  };
  function tidy() {
    const { you, model, edit, send, halt, conversations, settings } = words();
    for (const speaker of document.querySelectorAll("#chat [data-testid=user], #chat [data-testid=bot]")) {
      speaker.setAttribute("role", "article");
    }
    for (const title of document.querySelectorAll("#chat .thought-group .title")) {
      title.setAttribute("aria-expanded", title.classList.contains("expanded"));
      for (const arrow of title.querySelectorAll("button")) {
        arrow.disabled = true; // a button inside a button; clicks go to the outer one
        arrow.ariaHidden = "true";
      }
    }
    label("#chat [data-testid=user]", you);
    label("#chat [data-testid=bot]", model);
    label("#chat .edit-textarea", edit);
    label("#box .submit-button", send);
    label("#box .stop-button", halt);
    label("#left .toggle-button", conversations);
    label("#right .toggle-button", settings);
  }
  const watch = { subtree: true, childList: true, attributeFilter: ["aria-label"] };
  new MutationObserver(tidy).observe(document.documentElement, watch);
})();
