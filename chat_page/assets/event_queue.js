// A queue of the events that change the conversation. Gradio promises no order between the updates
// of two events, so a late update of a reply could be drawn over a conversation opened meanwhile.
// An event enters the queue, waits for its turn, and leaves after its last update is drawn. The
// value of this element is the id of the reply that is being written.
let last = Promise.resolve(); // resolves when the newest event has left
let begin;
const begun = new Promise((resolve) => (begin = resolve)); // resolves when `open` is called
let leave = () => {};
let inside = 0; // events that have entered and not left
let hurried = 0; // waiting events for which the current reply must end

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

window.eventQueue = {
  // Wait for all earlier events, then return the conversation. hurry: stop the current reply.
  async enter(seen, hurry = true) {
    await begun;
    return next(seen, hurry);
  },
  // Open the queue with the event that opens the page. Events that came earlier wait behind it.
  open() {
    const entered = next(null, true);
    begin();
    return entered;
  },
  leave: () => leave(),
  isWriting: () => Boolean(props.value),
  // Wait until the queue is empty.
  async empty() {
    while (inside) await last;
  },
};

watch("value", () => {
  window.box.keep(); // the server has the sent message now
  stop(); // an event may have come before the reply's id was known
});
