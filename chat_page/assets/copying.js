// Remove the invisible marks of `markup.py` from copied text.
(() => {
  const unmarked = (text) => text.replaceAll("\u2060", "");
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(unmarked(text));
  }
  document.addEventListener("copy", (event) => {
    const text = String(getSelection());
    if (text !== unmarked(text)) {
      event.clipboardData.setData("text/plain", unmarked(text));
      event.preventDefault();
    }
  });
  // A message that is being edited is a copy, too.
  document.addEventListener("focusin", ({ target }) => {
    if (target.classList.contains("edit-textarea") && target.value !== unmarked(target.value)) {
      target.value = unmarked(target.value);
      target.dispatchEvent(new Event("input"));
    }
  });
})();
