// The message box. Sending empties the box before Gradio handles the key or the click, so that text
// typed next stays. This tab keeps the sent message as a draft until the server has the message.
window.box = (() => {
  const { early } = window.common;
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
    if (message.trim() && !window.eventQueue.isWriting()) {
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
