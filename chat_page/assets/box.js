// The box for messages. What is sent leaves it at once, before Gradio sees the key or the click, so
// that what is typed next stays; it is kept for this tab until the server has it, as a draft is.
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
