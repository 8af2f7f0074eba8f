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

  // On a narrow screen the list lies over the chat: closed, when it has served.
  function closeList() {
    if (matchMedia("(max-width: 768px)").matches) {
      document.querySelector("#left.open .toggle-button")?.click();
    }
  }

  return {
    current: null, // the one that is shown
    wanted: null, // what was last asked for: one to open, a file's text, one to delete

    all() {
      return Object.keys(localStorage)
        .filter((key) => key.startsWith(PREFIX))
        .map((key) => parsed(localStorage.getItem(key)))
        .filter((conversation) => conversation?.id && conversation.turns?.length)
        .sort((a, b) => b.updated - a.updated);
    },
    // This one is shown now, as it is here.
    show(conversation) {
      if (conversation.id !== this.current?.id) window.chat.follow();
      this.current = conversation;
      sessionStorage.setItem(OPEN, conversation.id);
      return keep(conversation);
    },
    // The settings of this one have changed, whether it is still shown or not.
    set({ id, settings }) {
      if (id === this.current?.id) this.current = { ...this.current, settings };
      const kept = read(id); // which another tab may have gone on with
      return !kept || keep({ ...kept, settings });
    },
    // What has become of the one that was shown when an event began, here or in another tab.
    latest(seen) {
      const id = (seen ?? this.current)?.id;
      const shown = this.current?.id === id ? this.current : null;
      const kept = read(id);
      return kept && !(shown?.updated >= kept.updated) ? kept : (shown ?? seen);
    },
    // The one that is shown, where it is what another tab has changed.
    changedElsewhere(key) {
      return this.current && key === entry(this.current.id) ? read(this.current.id) : null;
    },
    remove(id) {
      localStorage.removeItem(entry(id));
    },

    // What is to be opened, as the next event brings it.
    none() {
      closeList();
      return null;
    },
    // The one that this tab showed before it was loaded anew.
    opened() {
      closeList();
      window.box.restore();
      return read(sessionStorage.getItem(OPEN));
    },
    chosen() {
      closeList();
      return this.latest(this.wanted.id === this.current?.id ? null : read(this.wanted.id));
    },
    brought() {
      closeList();
      return this.wanted;
    },
    deleted() {
      this.remove(this.wanted.id); // nothing more is written to it
      return null;
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
      window.chat.follow();
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

// The chat follows the reply that grows, unless its reader has scrolled up.
window.chat = (() => {
  const NEAR = 8; // pixels from the end
  let follows = true;
  const area = () => document.querySelector("#chat [role=log]");

  addEventListener(
    "scroll",
    ({ target }) => {
      if (target !== area()) return;
      follows = target.scrollHeight - target.scrollTop - target.clientHeight < NEAR;
    },
    true,
  );
  new MutationObserver(() => {
    const chat = area();
    if (follows && chat) chat.scrollTop = chat.scrollHeight;
  }).observe(document.documentElement, { subtree: true, childList: true, characterData: true });

  return {
    follow() {
      follows = true;
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

// A number outside of its field's bounds becomes the nearest of them, before Gradio sees it and
// fails; a line says so. An empty field is the model's own choice, where there is no slider.
(() => {
  const field = ({ target }) =>
    target.matches?.("#right input[type=number]") ? target : null;
  const early = (name, handle) => addEventListener(name, handle, true);

  early("focus", (event) => {
    const input = field(event);
    if (!input) return;
    input.dataset.before = input.value;
    input.closest(".block").querySelector(".between")?.remove();
  });
  early("keydown", (event) => event.key === "Enter" && field(event)?.blur());
  // Gradio takes a slider's value when the pointer leaves it, and knows no keys.
  early("keyup", ({ target }) => {
    if (target.matches?.("#right input[type=range]")) target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
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
    const note = document.createElement("p");
    note.className = "between";
    note.setAttribute("role", "status");
    const text = window.pageWords[document.documentElement.lang].between;
    note.textContent = text.replace("{least}", min).replace("{greatest}", max);
    input.closest(".block").append(note);
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
