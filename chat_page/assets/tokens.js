const { language, make } = window.common;
const words = props.words[language];

const percent = (probability) => `${(100 * probability).toFixed(probability < 0.0995 ? 1 : 0)} %`;
const visible = (text) => text.replaceAll("\n", "↵").replaceAll(" ", "␣") || "∅";

function menu(token, index) {
  const rows = token.alternatives.map((other) => {
    const choose = make("button", {}, make("code", {}, visible(other.text)), percent(other.probability));
    choose.onclick = () => trigger("choose", { token: index, choice: other.choice });
    return choose;
  });
  const chosen = make("p", {}, make("code", {}, visible(token.text)), percent(token.probability));
  return make("div", { class: "alternatives" }, chosen, ...rows);
}

const hide = () => element.querySelectorAll(".alternatives").forEach((old) => old.remove());

function piece(token, index) {
  const made = make("span", { class: "token", tabindex: "0", role: "button" }, token.text || "·");
  made.setAttribute("aria-label", `${visible(token.text)} ${percent(token.probability)}`);
  made.style.setProperty("--doubt", Math.min(1, -Math.log(token.probability + 1e-9) / 4).toFixed(2));
  // One menu at a time: a menu for each of thousands of tokens would slow down the page.
  const show = () => {
    hide();
    const shown = menu(token, index);
    const place = made.getBoundingClientRect();
    shown.style.left = `${Math.min(place.left, innerWidth - 220)}px`;
    shown.style.bottom = `${innerHeight - place.top}px`;
    made.after(shown);
  };
  made.onpointerenter = ({ pointerType }) => pointerType === "mouse" && show();
  made.onfocus = show;
  made.onclick = show;
  return made;
}

function draw() {
  const tokens = props.value ?? [];
  element.querySelector(".tokens").replaceChildren(
    make("p", { class: "note" }, tokens.length ? words.tokens_hint : words.tokens_none),
    make("div", { class: "text", role: "group", "aria-label": words.token_view }, ...tokens.map(piece)),
  );
}

watch("value", draw);
element.addEventListener("pointerleave", ({ pointerType }) => pointerType === "mouse" && hide());
element.addEventListener("focusout", ({ relatedTarget: next }) => {
  if (next && !element.contains(next)) hide();
});
addEventListener("pointerdown", ({ target }) => element.contains(target) || hide());
element.addEventListener("scroll", hide, true);
element.addEventListener("keydown", ({ key }) => {
  if (key !== "Escape") return;
  element.querySelector(".alternatives")?.previousSibling.focus();
  hide();
});
draw();
