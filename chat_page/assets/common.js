// Functions that several scripts of the page share.
window.common = {
  language: navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en",

  make(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  },
  // Handle an event before Gradio does.
  early: (name, handle) => addEventListener(name, handle, true),
};
