const { language, make } = window.common;
const words = props.words[language];
document.documentElement.lang = language;

function open(conversation) {
  window.conversations.asked.chosen = conversation;
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
      window.conversations.asked.deleted = conversation;
      trigger("fresh");
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
    if (chosen.size > props.most) return draw(words.file_too_large);
    window.conversations.asked.brought = await chosen.text();
    trigger("bring");
  };
  return make("label", { class: "bring" }, words.import, file);
}

let drawn = "";

function draw(note = "") {
  const all = window.conversations.all();
  const names = all.map(({ id, name }) => [id, name]);
  const state = JSON.stringify([names, props.value?.id, note]);
  if (state === drawn) return; // so that who moves through it by keyboard keeps their place
  drawn = state;
  const rows = all.map(row);
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
watch("set", () => note(!props.set || window.conversations.set(props.set)));
let waits = false; // to show what another tab has changed

addEventListener("storage", async ({ key }) => {
  draw();
  if (waits || !window.conversations.isCurrent(key)) return;
  waits = true;
  await window.lane.free(); // what changes meanwhile is shown with it
  waits = false;
  const changed = window.conversations.changedElsewhere();
  if (!changed) return;
  window.conversations.current = changed; // of two that are equally new, the other tab's
  open(changed);
});
draw();
