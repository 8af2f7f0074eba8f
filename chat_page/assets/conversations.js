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
    // This one is shown now, as it is here. Another tab may have gone on with it meanwhile.
    show(conversation) {
      if (conversation.id !== this.current?.id) window.chat.follow();
      this.current = conversation;
      sessionStorage.setItem(OPEN, conversation.id);
      return read(conversation.id)?.updated > conversation.updated || keep(conversation);
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
