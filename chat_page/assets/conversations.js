// The visitor's conversations, in their browser's storage: what is kept, shown and asked for.
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
    asked: {}, // what was last asked for: `chosen`, `brought` (a file's text), `deleted`

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
    // One as it is now: another tab may have gone on with what is shown here.
    newest(id) {
      const shown = this.current?.id === id ? this.current : null;
      const kept = read(id);
      return kept && !(shown?.updated >= kept.updated) ? kept : shown;
    },
    // What has become of the one that was shown when an event began.
    latest(seen) {
      return this.newest((seen ?? this.current)?.id) ?? seen;
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
      return this.newest(this.asked.chosen.id) ?? this.latest(); // it may have been deleted since
    },
    brought() {
      closeList();
      return this.asked.brought;
    },
    deleted() {
      this.remove(this.asked.deleted.id); // nothing more is written to it
      return null;
    },
  };
})();
