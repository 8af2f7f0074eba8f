const { language, make } = window.common;
const words = props.words[language];
document.documentElement.lang = language;

function open(conversation) {
  window.conversations.requested.chosen = conversation;
  trigger("choose");
}

function row(conversation) {
  const current = conversation.id === props.value?.id;
  const name = make("button", { class: "open", title: conversation.name }, conversation.name);
  if (current) name.setAttribute("aria-current", "true");
  name.onclick = () => open(conversation);
  const remove = make(
    "button",
    { class: "delete", "aria-label": `${words.delete}: ${conversation.name}` },
    "×",
  );
  remove.onclick = () => {
    if (!confirm(words.delete_sure)) return;
    if (current) {
      window.conversations.requested.deleted = conversation;
      trigger("delete_open");
    } else {
      window.conversations.remove(conversation.id);
      draw();
    }
  };
  return make("li", {}, name, remove);
}

function fileButton() {
  const file = make("input", { type: "file", accept: ".json,application/json" });
  file.onchange = async () => {
    const [chosen] = file.files;
    file.value = "";
    if (!chosen) return;
    // The limit counts characters. A character of UTF-8 has at most four bytes.
    const text = chosen.size > 4 * props.max_size ? null : await chosen.text();
    if (text === null || text.length > props.max_size) return draw(words.file_too_large);
    window.conversations.requested.imported = text;
    trigger("import_file");
  };
  return make("label", { class: "import" }, words.import, file);
}

let drawn = "";

function draw(note = "") {
  const all = window.conversations.all();
  const names = all.map(({ id, name }) => [id, name]);
  const state = JSON.stringify([names, props.value?.id, note]);
  if (state === drawn) return; // a new list would lose the keyboard focus
  drawn = state;
  const rows = all.map(row);
  const list = make("ul", { "aria-label": words.conversations }, ...rows);
  element.querySelector(".conversation-list").replaceChildren(
    rows.length ? list : make("p", { class: "note" }, words.none_yet),
    make("p", { class: "note", role: "status" }, note),
    fileButton(),
    make("p", { class: "note" }, words.kept_where),
  );
}

const report = (isStored) => draw(isStored ? "" : words.storage_full);

watch("value", () => report(!props.value || window.conversations.show(props.value)));
watch("changed_settings", () => {
  report(!props.changed_settings || window.conversations.changeSettings(props.changed_settings));
});
let waits = false; // to show what another tab has changed

addEventListener("storage", async ({ key }) => {
  draw();
  if (waits || !window.conversations.isCurrent(key)) return;
  waits = true;
  await window.eventQueue.empty(); // one redraw then shows all changes made meanwhile
  waits = false;
  const changed = window.conversations.changedElsewhere();
  if (!changed) return;
  window.conversations.current = changed; // if both are equally new, the other tab's version wins
  open(changed);
});
draw();
