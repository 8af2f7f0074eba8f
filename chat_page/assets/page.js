// What the page's parts share: the visitor's conversations, and what is copied.

window.conversations = (() => {
  const PREFIX = "llm-chat:";
  const OPEN = "llm-chat-open"; // of this tab
  const entry = (id) => PREFIX + id;

  function parsed(text) {
    try {
      return JSON.parse(text);
    } catch {
      return null;
    }
  }

  return {
    chosen: null, // what was last asked for: the next event reads it
    brought: null,

    all() {
      return Object.keys(localStorage)
        .filter((key) => key.startsWith(PREFIX))
        .map((key) => parsed(localStorage.getItem(key)))
        .filter((conversation) => conversation && conversation.id)
        .sort((a, b) => b.updated - a.updated);
    },
    // Whether it could be kept: a browser's storage has an end.
    write(conversation) {
      sessionStorage.setItem(OPEN, conversation.id);
      if (!conversation.turns.length) return true;
      try {
        localStorage.setItem(entry(conversation.id), JSON.stringify(conversation));
        return true;
      } catch {
        return false;
      }
    },
    remove(id) {
      localStorage.removeItem(entry(id));
    },
    // The one that this tab showed before it was loaded anew.
    opened() {
      return parsed(localStorage.getItem(entry(sessionStorage.getItem(OPEN))));
    },
  };
})();

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
  document.addEventListener("focusin", ({ target }) => {
    if (target.classList.contains("edit-textarea") && target.value !== unmarked(target.value)) {
      target.value = unmarked(target.value);
      target.dispatchEvent(new Event("input"));
    }
  });
})();
