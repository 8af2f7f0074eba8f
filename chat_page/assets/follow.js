// Scroll the chat with a growing reply, unless the user has scrolled up.
window.chat = (() => {
  const NEAR = 8; // pixels; the end of the chat counts as reached within this distance
  let follows = true;
  const area = () => document.querySelector("#chat [role=log]");

  window.common.early("scroll", ({ target }) => {
    if (target !== area()) return;
    follows = target.scrollHeight - target.scrollTop - target.clientHeight < NEAR;
  });
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
