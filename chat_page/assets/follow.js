// The chat follows the reply that grows, unless its reader has scrolled up.
window.chat = (() => {
  const NEAR = 8; // pixels from the end
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
