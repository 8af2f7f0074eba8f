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

  const read = (id) => parsed(localStorage.getItem(entry(id)));

  // Whether it could be kept: a browser's storage has an end.
  function keep(conversation) {
    if (!conversation.turns.length) return true;
    try {
      localStorage.setItem(entry(conversation.id), JSON.stringify(conversation));
      return true;
    } catch {
      return false;
    }
  }

  return {
    current: null, // the one that is shown
    chosen: null, // what was last asked for: the next event reads it
    brought: null,
    unwanted: null,

    all() {
      return Object.keys(localStorage)
        .filter((key) => key.startsWith(PREFIX))
        .map((key) => parsed(localStorage.getItem(key)))
        .filter((conversation) => conversation?.id && conversation.turns?.length)
        .sort((a, b) => b.updated - a.updated);
    },
    // This one is shown now, as it is here.
    show(conversation) {
      this.current = conversation;
      sessionStorage.setItem(OPEN, conversation.id);
      return keep(conversation);
    },
    // This one has changed, whether it is still shown or not.
    change(conversation) {
      if (conversation.id === this.current?.id) this.current = conversation;
      return !read(conversation.id) || keep(conversation);
    },
    // What has become of the one that was shown when an event began.
    latest(seen) {
      return !seen || seen.id === this.current?.id ? this.current : (read(seen.id) ?? seen);
    },
    remove(id) {
      localStorage.removeItem(entry(id));
    },
    // The one that this tab showed before it was loaded anew.
    opened() {
      window.box.restore();
      // On a narrow screen the list lies over the chat: closed, until it is wanted.
      const toggle = document.querySelector("#left.open .toggle-button");
      if (matchMedia("(max-width: 768px)").matches) toggle?.click();
      return read(sessionStorage.getItem(OPEN));
    },
  };
})();

// The box for messages. What is sent leaves it at once, before Gradio sees the key or the click, so
// that what is typed next stays; it is kept for this tab until the server has it, as a draft is.
window.box = (() => {
  const DRAFT = "llm-chat-draft";
  const sent = [];
  const area = () => document.querySelector("#box textarea");
  const keep = () => sessionStorage.setItem(DRAFT, area().value);

  function fill(text) {
    area().value = text;
    area().dispatchEvent(new Event("input", { bubbles: true }));
  }
  function send(event) {
    const message = area().value;
    if (message.trim() && !window.lane.isWriting()) {
      sent.push(message);
      fill("");
      sessionStorage.setItem(DRAFT, message);
    } else {
      event.stopImmediatePropagation();
      event.preventDefault();
    }
  }
  document.addEventListener("input", ({ target }) => target === area() && keep());
  const early = (name, handle) => addEventListener(name, handle, true);
  early("keypress", (event) => {
    if (event.key === "Enter" && !event.shiftKey && event.target === area()) send(event);
  });
  early("click", (event) => event.target.closest?.("#box .submit-button") && send(event));

  return {
    take: () => sent.shift(),
    keep,
    restore() {
      const draft = sessionStorage.getItem(DRAFT);
      if (draft && !area().value) fill(draft);
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
  // (The text of a message that is edited is a copy of it, too.)
  document.addEventListener("focusin", ({ target }) => {
    if (target.classList.contains("edit-textarea") && target.value !== unmarked(target.value)) {
      target.value = unmarked(target.value);
      target.dispatchEvent(new Event("input"));
    }
  });
})();

// Gradio names a message by its whole text, HTML and all, and leaves other things without a name.
// A screen reader reads the text itself; what it needs is who speaks, and what a button is for.
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
        arrow.disabled = true; // a button within a button; a click goes to the outer one
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
