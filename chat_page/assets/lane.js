// One thing at a time. A reply comes in many updates, and Gradio promises no order between those
// and the updates of another event: one that is late would be drawn over what was opened meanwhile.
// So whatever changes the conversation enters here, and leaves when its last update is drawn. This
// element's value is the id of the reply that is being written.
let last = Promise.resolve(); // until whoever entered last has left
let begin;
const begun = new Promise((resolve) => (begin = resolve)); // what opens the page goes first
let leave = () => {};
let inside = 0; // who has entered and not left
let hurried = 0; // how many wait for whom that reply is to end

function stop() {
  if (hurried && props.value) trigger("stop");
}

async function next(seen, hurry) {
  const before = last;
  let left;
  last = new Promise((resolve) => (left = resolve));
  inside++;
  if (hurry) {
    hurried++;
    stop();
  }
  await before;
  if (hurry) hurried--;
  leave = () => {
    leave = () => {};
    inside--;
    left();
  };
  return window.conversations.latest(seen);
}

window.lane = {
  // Waits for those before, and brings the conversation as it is then.
  async enter(seen, hurry = true) {
    await begun;
    return next(seen, hurry);
  },
  // The event that opens the page enters here. Events that came earlier wait behind it.
  first() {
    const entered = next(null, true);
    begin();
    return entered;
  },
  leave: () => leave(),
  isWriting: () => Boolean(props.value),
  // Comes when nobody is inside.
  async free() {
    while (inside) await last;
  },
};

watch("value", () => {
  window.box.keep(); // the server has what was sent
  stop(); // also a reply whose id was not known yet
});
