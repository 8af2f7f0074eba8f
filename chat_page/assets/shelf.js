const language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
const words = props.words[language];
document.documentElement.lang = language;

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function row(conversation) {
  const current = conversation.id === props.value?.id;
  const open = make("button", { class: "open", title: conversation.name }, conversation.name);
  if (current) open.setAttribute("aria-current", "true");
  open.onclick = () => {
    window.conversations.chosen = conversation;
    trigger("choose");
  };
  const remove = make(
    "button",
    { class: "delete", "aria-label": `${words.delete}: ${conversation.name}` },
    "×",
  );
  remove.onclick = () => {
    if (!confirm(words.delete_sure)) return;
    window.conversations.remove(conversation.id);
    if (current) trigger("fresh");
    draw();
  };
  return make("li", {}, open, remove);
}

function fileButton() {
  const file = make("input", { type: "file", accept: ".json,application/json" });
  file.onchange = async () => {
    const [chosen] = file.files;
    file.value = "";
    if (!chosen) return;
    if (chosen.size > props.most) return draw(words.file_too_large);
    window.conversations.brought = await chosen.text();
    trigger("bring");
  };
  return make("label", { class: "bring" }, words.import, file);
}

function draw(note = "") {
  const rows = window.conversations.all().map(row);
  const list = make("ul", { "aria-label": words.conversations }, ...rows);
  element.querySelector(".shelf").replaceChildren(
    rows.length ? list : make("p", { class: "note" }, words.none_yet),
    make("p", { class: "note", role: "status" }, note),
    fileButton(),
    make("p", { class: "note" }, words.kept_where),
  );
}

watch("value", () => {
  const kept = !props.value || window.conversations.write(props.value);
  draw(kept ? "" : words.storage_full);
});
addEventListener("storage", () => draw()); // another tab has changed something
draw();
