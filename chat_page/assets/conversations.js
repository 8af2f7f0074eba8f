// The user's conversations: those in the browser's storage, and the one that this tab shows.
window.conversations = (() => {
  const PREFIX = "llm-chat:";
  const OPEN = "llm-chat-open"; // the id of the conversation that this tab shows
  const entry = (id) => PREFIX + id;

  function parsed(text) {
    try {
      return JSON.parse(text);
    } catch {
      return null;
    }
  }

  const read = (id) => parsed(localStorage.getItem(entry(id)));

  // Store a conversation; false if the browser's storage is full. An unchanged conversation is not
  // written again: a tab reads another tab's writes late, and the write would undo them.
  function keep(conversation) {
    const [key, text] = [entry(conversation.id), JSON.stringify(conversation)];
    if (!conversation.turns.length || localStorage.getItem(key) === text) return true;
    try {
      localStorage.setItem(key, text);
      return true;
    } catch {
      return false;
    }
  }

  // Close the list on a narrow screen, where it covers the chat.
  function closeList() {
    if (matchMedia("(max-width: 768px)").matches) {
      document.querySelector("#left.open .toggle-button")?.click();
    }
  }

  return {
    current: null, // the conversation on show
    requested: {}, // input of the next event: `chosen`, `imported` (a file's text) or `deleted`

    all() {
      return Object.keys(localStorage)
        .filter((key) => key.startsWith(PREFIX))
        .map((key) => parsed(localStorage.getItem(key)))
        .filter((conversation) => conversation?.id && conversation.turns?.length)
        .sort((a, b) => b.updated - a.updated);
    },
    // Show a conversation, and store it if no newer version is stored. False if storage is full.
    show(conversation) {
      if (conversation.id !== this.current?.id) window.chat.follow();
      this.current = conversation;
      sessionStorage.setItem(OPEN, conversation.id);
      return read(conversation.id)?.updated > conversation.updated || keep(conversation);
    },
    // Change the settings of a conversation, on show or not. False if storage is full.
    changeSettings({ id, settings }) {
      if (id === this.current?.id) this.current = { ...this.current, settings };
      const kept = read(id); // another tab may have stored a newer version
      return !kept || keep({ ...kept, settings });
    },
    // The newest version of a conversation, on show or stored; null if there is none.
    newest(id) {
      const shown = this.current?.id === id ? this.current : null;
      const kept = read(id);
      return kept && !(shown?.updated >= kept.updated) ? kept : shown;
    },
    // The newest version of `seen`, the conversation on show when an event began.
    latest(seen) {
      return this.newest((seen ?? this.current)?.id) ?? seen;
    },
    isCurrent(key) {
      return this.current && key === entry(this.current.id);
    },
    // The stored version of the conversation on show, if another tab has changed it; else null.
    // If two tabs wrote at the same time and the older version won, the newer one is stored again.
    changedElsewhere() {
      const kept = this.current && read(this.current.id);
      if (kept?.updated < this.current?.updated) keep(this.current);
      const same = JSON.stringify(kept) === JSON.stringify(this.current);
      return !same && kept?.updated >= this.current.updated ? kept : null;
    },
    remove(id) {
      localStorage.removeItem(entry(id));
    },

    // The conversation to open, for each kind of event; null for a new one.
    none() {
      closeList();
      return null;
    },
    // The conversation that this tab showed before it was reloaded.
    opened() {
      closeList();
      window.box.restore();
      return read(sessionStorage.getItem(OPEN));
    },
    chosen() {
      closeList();
      return this.newest(this.requested.chosen.id) ?? this.latest(); // it may be deleted by now
    },
    imported() {
      closeList();
      return this.requested.imported;
    },
    deleted() {
      this.remove(this.requested.deleted.id); // its reply has ended: nothing stores it again
      return null;
    },
  };
})();
