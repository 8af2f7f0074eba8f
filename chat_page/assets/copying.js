// The page marks what must not be read as HTML or as a formula by an invisible character. Nobody
// wants it in what they copy.
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
  // (The text of a message that is edited is a copy of it, too.)
  document.addEventListener("focusin", ({ target }) => {
    if (target.classList.contains("edit-textarea") && target.value !== unmarked(target.value)) {
      target.value = unmarked(target.value);
      target.dispatchEvent(new Event("input"));
    }
  });
})();
