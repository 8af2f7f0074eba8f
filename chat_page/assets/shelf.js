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
    if (current) {
      window.conversations.unwanted = conversation.id; // once nothing more is written to it
      trigger("fresh");
    } else {
      window.conversations.remove(conversation.id);
      draw();
    }
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

const note = (kept) => draw(kept ? "" : words.storage_full);

watch("value", () => note(!props.value || window.conversations.show(props.value)));
watch("changed", () => note(!props.changed || window.conversations.change(props.changed)));
addEventListener("storage", () => draw()); // another tab has changed something
draw();
