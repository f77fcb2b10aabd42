// The page of the studio. Charts and tables come from the server, in which no text of others is markup; whatever else is shown here
// is set as text. What is looked at stands in the address, so that it can be kept or sent.

const KEY = "oomless-token";
const PAUSE_MS = 1000;

const find = (selector, inside = document) => inside.querySelector(selector);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));

function made(tag, text = "", attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// ---- asking the server

class Refused extends Error {}

async function ask(path, asked, how = {}) {
  const headers = { "x-oomless-token": localStorage.getItem(KEY) ?? "" };
  const body = asked instanceof Blob ? asked : JSON.stringify(asked);
  const options = asked === undefined ? { headers } : { method: "POST", headers, body, ...how };
  let answer;
  try {
    answer = await fetch(`api/${path}`, options);
  } catch {
    throw new Error("The studio does not answer: it was closed. Runs go on; start oomless studio again.");
  }
  const said = await answer.json();
  if (!answer.ok) throw new (answer.status === 422 ? Refused : Error)(said.error);
  return said;
}

function trouble(message) {
  const place = find("#trouble");
  if (place.textContent !== message) place.textContent = message;
  place.hidden = !message;
}

// Ask again and again while `wanted` says so; what is only drawn is not asked for while nobody sees the page.
async function repeat(wanted, look, unseen = false) {
  while (wanted()) {
    if (unseen || !document.hidden) {
      try {
        await look();
        trouble("");
      } catch (error) {
        trouble(error.message);
      }
    }
    await wait(PAUSE_MS);
  }
}

// Put what the server drew into `place`, part by part, so that what did not change stays as it is: scrolled, focused, read.
function show(place, html) {
  const drawn = document.createElement("template");
  drawn.innerHTML = html;
  const parts = [...drawn.content.children];
  parts.forEach((part, number) => {
    const there = place.children[number];
    if (there === undefined) place.append(part);
    else if (there.outerHTML !== part.outerHTML) renew(there, part);
  });
  while (place.children.length > parts.length) place.lastElementChild.remove();
}

function renew(old, part) {
  const scrolled = [...old.querySelectorAll(".scroll, pre")].map((one) => [one.scrollLeft, one.scrollTop]);
  const focused = [...old.querySelectorAll("[tabindex]")].indexOf(document.activeElement);
  old.replaceWith(part);
  [...part.querySelectorAll(".scroll, pre")].forEach((one, number) => {
    if (scrolled[number]) [one.scrollLeft, one.scrollTop] = scrolled[number];
  });
  if (focused >= 0) part.querySelectorAll("[tabindex]")[focused]?.focus({ preventScroll: true });
}

// ---- the address: #room?name=value&...

function address() {
  const [room, query = ""] = location.hash.slice(1).split("?");
  return { room, query: new URLSearchParams(query) };
}

function go(room, query, replace = false) {
  const hash = `#${room}${[...query].length ? `?${query}` : ""}`;
  if (hash === location.hash) return;
  if (replace) history.replaceState(null, "", hash);
  else location.hash = hash;
}

// ---- the room of runs

const runs = {
  chosen: [],
  enter(query) {
    this.chosen = query.getAll("run");
    this.draw().catch((error) => trouble(error.message));
    if (!this.looking) this.looking = repeat(() => address().room === "runs", () => this.draw()).then(() => (this.looking = null));
  },
  async draw() {
    const { runs: found } = await ask("runs");
    find("#runs-none").hidden = found.length > 0;
    find("#runs-list").hidden = found.length === 0;
    if (!this.chosen.length && found.length) {
      this.chosen = [found[0].name];
      this.keep(true);
    }
    this.list(found);
    const there = this.chosen.filter((name) => found.some((run) => run.name === name));
    const place = find("#runs-shown");
    if (there.length) {
      const { html } = await ask("runs/show", { names: there });
      if (address().room === "runs") show(place, html);
    } else place.replaceChildren();
  },
  list(found) {
    const body = find("#runs tbody");
    const rows = new Map([...body.children].map((row) => [row.dataset.name, row]));
    found.forEach((run, number) => {
      const row = rows.get(run.name) ?? this.row(run.name);
      rows.delete(run.name);
      if (body.children[number] !== row) body.insertBefore(row, body.children[number] ?? null);
      this.fill(row, run);
    });
    for (const row of rows.values()) row.remove();
  },
  row(name) {
    const row = made("tr");
    row.dataset.name = name;
    const box = made("input", "", { type: "checkbox", "aria-label": `Draw ${name}` });
    box.addEventListener("change", () => {
      this.chosen = box.checked ? [...this.chosen, name] : this.chosen.filter((one) => one !== name);
      this.keep();
    });
    const only = made("button", name, { class: "link" });
    only.addEventListener("click", () => {
      this.chosen = [name];
      this.keep();
    });
    const cells = [box, only, "", made("progress", "", { max: "1", "aria-label": `Steps of ${name}` }), "", "", "", "", made("button")];
    for (const cell of cells) {
      const place = made("td");
      place.append(cell);
      row.append(place);
    }
    row.children[3].append(made("span"));
    row.lastElementChild.firstElementChild.addEventListener("click", (event) => this.act(event.target));
    return row;
  },
  fill(row, run) {
    const [draw, , state, step, loss, speed, memory, changed, action] = row.children;
    draw.firstElementChild.checked = this.chosen.includes(run.name);
    row.classList.toggle("chosen", this.chosen.includes(run.name));
    const text = (place, value) => place.textContent === value || (place.textContent = value);
    text(state, run.state);
    state.className = `state ${run.state.split(" ")[0]}`;
    step.firstElementChild.hidden = run.share === null;
    if (run.share !== null) step.firstElementChild.value = run.share;
    text(step.lastElementChild, run.step);
    text(loss, run.loss);
    text(speed, run.speed);
    text(memory, run.memory);
    text(changed, new Date(run.changed * 1000).toLocaleString());
    const button = action.firstElementChild;
    const does = { trains: "stop", stopped: "resume" }[run.state] ?? "";
    text(button, { stop: "Stop", resume: "Resume" }[does] ?? "");
    button.dataset.does = does;
    button.dataset.name = run.name;
    button.hidden = !does;
    button.setAttribute("aria-label", `${button.textContent} ${run.name}`);
  },
  async act(button) {
    const { name, does } = button.dataset;
    button.disabled = true;
    try {
      await ask(`runs/${does}`, { name });
      find("#runs-said").textContent =
        does === "stop" ? `${name} finishes its step, saves and ends.` : `${name} goes on from its last checkpoint.`;
    } catch (error) {
      find("#runs-said").textContent = error.message;
    }
    button.disabled = false;
  },
  keep(replace = false) {
    go("runs", new URLSearchParams(this.chosen.map((name) => ["run", name])), replace);
  },
};

// ---- the room of plans

const MOST_COMPARED = 6;
const COLOURS = 8; // of those of charts, those that tell picks apart
const viewer = [...crypto.getRandomValues(new Uint32Array(4))].join("-");

// Every question that the lists in `query` make together.
function questions(query) {
  let made = [{}];
  for (const [name, value] of query) {
    const values = ["model", "gpu", "max_seq_length"].includes(name) ? value.split(",").map((one) => one.trim()).filter(Boolean) : [value];
    made = made.flatMap((one) => values.map((each) => ({ ...one, [name]: each })));
  }
  return made;
}

const named = ({ model, gpu, max_seq_length: length }) => `${model} on ${gpu}${length ? `, ${length} tokens` : ""}`;

// How far the answer to a question is, and then the answer, in `room`; `answered` is told what was said.
function card(room, question, named, { several = false, answered = () => {} } = {}) {
  const place = made("article", "", { "aria-busy": "true" });
  place.setAttribute("aria-label", named);
  if (several) place.append(made("h2", named));
  const going = made("div", "", { class: "going" });
  const bar = made("progress", "", { max: "1", "aria-label": `Search: ${named}` });
  const words = made("span", "asking");
  const enough = made("button", "Take the best so far", { type: "button" });
  enough.addEventListener("click", () => ask("enough", { question }).catch((error) => trouble(error.message)));
  going.append(bar, words);
  if (room === "plan") going.append(enough);
  const answer = made("div", "", { class: "drawn" });
  place.append(going, answer);
  find(`#${room}-answers`).append(place);
  const one = { question, wanted: true };
  repeat(
    () => one.wanted,
    async () => {
      const said = await ask("look", { question, viewer }).catch((error) => {
        if (error instanceof Refused) return { error: error.message };
        throw error;
      });
      if (!one.wanted) return;
      if (said.share != null) bar.value = said.share;
      words.textContent = `${said.seconds} s  ${said.words}`;
      if (said.partial) show(answer, said.partial);
      if (said.html == null && said.error == null) return;
      one.wanted = false;
      going.remove();
      place.setAttribute("aria-busy", "false");
      if (said.error != null) answer.replaceChildren(made("p", said.error, { class: "error", role: "alert" }));
      else {
        show(answer, said.html);
        for (const text of answer.querySelectorAll("pre.copied")) copies(text);
      }
      answered(said, place);
      find(`#${room}-said`).textContent = `${named}: answered.`;
    },
    true,
  );
  return one;
}

function leave(cards, closing) {
  for (const one of cards) {
    if (!one.wanted) continue;
    one.wanted = false;
    ask("leave", { question: one.question, viewer }, { keepalive: closing }).catch(() => {});
  }
}

// A room whose questions are asked while it is looked at.
const asking = {
  cards: [],
  leave(closing = false) {
    leave(this.cards, closing);
    this.cards = [];
  },
};

const plan = {
  ...asking,
  asked: "",
  async offer() {
    if (this.offered) return;
    this.offered = true;
    try {
      const offers = await ask("plan/offers");
      const options = (place, of, empty = []) =>
        find(place).append(...empty, ...Object.entries(of).map(([value, said]) => made("option", said, { value })));
      this.offers = offers;
      options("#plan-models", offers.model);
      options("#plan-gpus", offers.gpu);
      options("#plan-trainables", offers.trainable);
      for (const select of document.querySelectorAll("#plan-form details select")) {
        for (const [value, said] of Object.entries(offers[select.name])) select.append(made("option", said || value, { value }));
      }
      for (const [name, said] of Object.entries(offers.help)) {
        find(`#plan-form [name="${name}"]`).title = said;
      }
      this.fill();
      around.show(around.question);
    } catch (error) {
      this.offered = false;
      trouble(error.message);
    }
  },
  enter(query) {
    this.offer();
    this.query = query;
    this.fill();
    if (`${query}` === this.asked) return;
    this.leave();
    this.asked = `${query}`;
    find("#plan-answers").replaceChildren();
    if (!query.get("model")) return around.show(null);
    const asked = questions(query);
    find("#plan-said").textContent = asked.length > MOST_COMPARED ? `The first ${MOST_COMPARED} of ${asked.length} are compared.` : "";
    const several = asked.length > 1;
    this.cards = asked.slice(0, MOST_COMPARED).map((question) =>
      card("plan", question, named(question), {
        several,
        answered: (said, place) => {
          around.note(question, said);
          if (said.trains && !several) find("pre[aria-label=Command]", place).closest("section").append(beginning(question, said.pick));
        },
      }),
    );
    find("#plan-answers").classList.toggle("beside", several);
    around.show(several ? null : asked[0]);
  },
  fill() {
    for (const field of find("#plan-form").elements) if (field.name) field.value = this.query?.get(field.name) ?? "";
    if ([...find("#plan-form details").querySelectorAll("[name]")].some((field) => field.value)) find("#plan-form details").open = true;
  },
  leave(closing = false) {
    asking.leave.call(this, closing);
    around.leave(closing);
    this.asked = "";
  },
};

// Other lengths and GPUs for the question that is asked, and where on these ways the pick changes.
const around = {
  question: null,
  picks: new Map(), // by question: its pick in short, or an error
  searching: [],
  ways: {
    max_seq_length: { title: "Length", name: (value) => `${Number(value).toLocaleString("en")} tokens`, size: Number, stops: () => plan.offers.lengths },
    gpu: { title: "GPU", name: (value) => value, size: (gpu) => parseFloat(plan.offers.gpu[gpu] ?? gpu), stops: () => plan.offers.gpus_by_memory },
  },
  key: (question) => JSON.stringify(Object.entries(question).sort()),
  note(question, said) {
    this.picks.set(this.key(question), said.pick ?? { strategy: "cannot be planned" });
    this.draw();
  },
  show(question) {
    this.question = question;
    const place = find("#plan-around");
    place.hidden = !question || !plan.offers;
    if (place.hidden) return;
    find("#plan-ways").replaceChildren(...Object.entries(this.ways).map(([setting, way]) => this.way(setting, way)));
    this.draw();
  },
  way(setting, way) {
    const stops = [...way.stops()];
    const now = this.question[setting] ?? plan.offers.usual_length;
    if (!stops.includes(now)) {
      const alike = way.size(now) > 0 ? stops.findIndex((stop) => way.size(stop) >= way.size(now)) : 0;
      stops.splice(alike < 0 ? stops.length : alike, 0, now);
    }
    const place = made("div", "", { class: "way" });
    const id = `plan-way-${setting}`;
    const slider = made("input", "", { type: "range", id, min: 0, max: stops.length - 1, step: 1 });
    slider.value = Math.max(0, stops.indexOf(now));
    const shown = made("output", "", { for: id });
    const strip = made("div", "", { class: "strip", "aria-hidden": "true" });
    strip.append(...stops.map((stop) => made("span", "", { title: way.name(stop) })));
    const tell = () => {
      const pick = this.picks.get(this.key({ ...this.question, [setting]: stops[slider.value] }));
      shown.textContent = `${way.name(stops[slider.value])}${pick ? `: ${[pick.strategy, pick.memory].filter(Boolean).join(", ")}` : ""}`;
      slider.setAttribute("aria-valuetext", shown.textContent);
    };
    slider.addEventListener("input", tell);
    slider.addEventListener("change", () => {
      const query = new URLSearchParams(plan.query);
      query.set(setting, stops[slider.value]);
      go("plan", query);
      enter();
      find(`#${id}`)?.focus({ preventScroll: true });
    });
    const all = made("button", "Plan all of them", { type: "button", "aria-label": `Plan every ${way.title}` });
    all.addEventListener("click", () => this.search(setting, stops));
    const changes = made("p", "", { class: "dim" });
    place.append(made("label", way.title, { for: id }), slider, shown, all, strip, changes);
    Object.assign(place, { draw: () => this.fill(setting, way, stops, strip, changes), tell });
    return place;
  },
  // One after the other, so that what is asked otherwise does not wait; what was searched is kept by the server.
  search(setting, stops) {
    const of = this.question;
    for (const stop of stops) {
      const question = { ...of, [setting]: stop };
      if (!this.picks.has(this.key(question))) this.searching.push({ question, wanted: true });
    }
    if (!this.busy) this.busy = this.work().finally(() => (this.busy = null));
  },
  async work() {
    while (this.searching.length) {
      const one = this.searching[0];
      await repeat(
        () => one.wanted,
        async () => {
          const said = await ask("look", { question: one.question, viewer }).catch((error) => ({ error: error.message }));
          find("#plan-around-said").textContent = `${named(one.question)}: ${said.words ?? ""}; ${this.searching.length} to plan`;
          if (!one.wanted || (said.html == null && said.error == null)) return;
          one.wanted = false;
          this.note(one.question, said);
        },
        true,
      );
      this.searching = this.searching.filter((other) => other !== one);
    }
    find("#plan-around-said").textContent = "";
  },
  draw() {
    for (const place of find("#plan-ways").children) {
      place.draw();
      place.tell();
    }
  },
  fill(setting, way, stops, strip, changes) {
    const known = stops.map((stop) => this.picks.get(this.key({ ...this.question, [setting]: stop })));
    const kinds = [...new Set(known.filter(Boolean).map((pick) => pick.strategy))];
    [...strip.children].forEach((cell, number) => {
      const pick = known[number];
      cell.className = pick ? `c${kinds.indexOf(pick.strategy) % COLOURS}` : "";
      cell.title = `${way.name(stops[number])}: ${pick ? [pick.strategy, pick.memory].filter(Boolean).join(", ") : "not planned"}`;
    });
    const spans = [];
    known.forEach((pick, number) => {
      if (!pick) return;
      const last = spans.at(-1);
      if (last?.strategy === pick.strategy) last.to = number;
      else spans.push({ strategy: pick.strategy, from: number, to: number });
    });
    changes.replaceChildren(
      ...spans.flatMap(({ strategy, from, to }) => {
        const key = made("i", "", { class: `key area c${kinds.indexOf(strategy) % COLOURS}` });
        const words = made("span", "", { class: "named" });
        words.append(key, `${way.name(stops[from])}${to > from ? ` to ${way.name(stops[to])}` : ""}: ${strategy}`);
        return [words, " "];
      }),
    );
  },
  leave(closing = false) {
    leave(this.searching, closing);
    this.searching = [];
  },
};

// What begins a run from the answer to `question`, which picked `pick`.
function beginning(question, pick) {
  const form = made("form", "", { class: "begin", "aria-label": "Start this run" });
  const field = (name, label, attributes = {}) => {
    const place = made("label", label);
    place.append(made("input", "", { name, autocomplete: "off", spellcheck: "false", ...attributes }));
    form.append(place);
  };
  field("data", "Text to train on", { required: "", placeholder: "a file or folder" });
  field("name", "Name of the run", { required: "", placeholder: "first" });
  field("max_steps", "Steps", { inputmode: "numeric", placeholder: "all of the text" });
  field("learning_rate", "Learning rate", { inputmode: "decimal", placeholder: pick.learning_rate });
  field("sample_prompts", "Text to go on from on the way", { placeholder: "none" });
  const said = made("span", "", { role: "status" });
  form.append(made("button", "Start it", { class: "main" }), said);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const { name, ...given } = Object.fromEntries([...new FormData(form)].filter(([, value]) => value.trim()));
    try {
      const begun = await ask("runs/begin", { question, name, given });
      go("runs", new URLSearchParams([["run", begun.name]]));
    } catch (error) {
      said.textContent = error.message;
    }
  });
  return form;
}

function copies(text) {
  const button = made("button", "Copy", { type: "button", class: "copy", "aria-label": `Copy: ${text.getAttribute("aria-label")}` });
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
      button.textContent = "Selected: press Ctrl-C";
    }
  });
  text.before(button);
}

find("#plan-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const query = new URLSearchParams();
  for (const field of event.target.elements) if (field.name && field.value.trim()) query.append(field.name, field.value.trim());
  if (`${query}` === plan.asked) plan.leave();
  go("plan", query);
  enter();
});
window.addEventListener("pagehide", () => [plan, explain, compare].forEach((room) => room.leave(true)));
window.addEventListener("pageshow", (event) => event.persisted && enter());

// ---- the room of explanations

const explain = {
  ...asking,
  enter() {
    plan.offer();
  },
  async explain(form) {
    this.leave();
    find("#explain-answers").replaceChildren();
    find("#explain-said").textContent = "";
    try {
      const log = find("#explain-log").value;
      const question = log.trim() ? await ask("explain/keep", { text: log }) : {};
      if (this.snapshot) Object.assign(question, await ask("explain/snapshot", this.snapshot));
      if (!Object.keys(question).length) throw new Error("Paste what the run printed, or choose a file.");
      for (const field of form.elements) if (field.name && field.value.trim()) question[field.name] = field.value.trim();
      this.cards = [card("explain", question, this.snapshot ? this.snapshot.name : "The log")];
    } catch (error) {
      find("#explain-said").textContent = error.message;
    }
  },
};

find("#explain-form").addEventListener("submit", (event) => {
  event.preventDefault();
  explain.explain(event.target);
});
// A snapshot is a pickle, which begins with its protocol; the server reads it without running anything of it.
async function taken(file) {
  const [first] = new Uint8Array(await file.slice(0, 1).arrayBuffer());
  explain.snapshot = first === 0x80 ? file : null;
  if (!explain.snapshot) find("#explain-log").value = await file.text();
  find("#explain-taken").textContent = explain.snapshot ? `Snapshot: ${file.name}` : "";
}

find("#explain-file").addEventListener("change", (event) => {
  if (event.target.files[0]) taken(event.target.files[0]);
  else explain.snapshot = find("#explain-taken").textContent = "";
});
find("#explain-form").addEventListener("dragover", (event) => event.preventDefault());
find("#explain-form").addEventListener("drop", (event) => {
  if (!event.dataTransfer.files[0]) return;
  event.preventDefault();
  taken(event.dataTransfer.files[0]);
});

// ---- the room of comparisons

const compare = {
  ...asking,
  async enter(query) {
    plan.offer();
    try {
      const { runs: found } = await ask("compare");
      const select = find("#compare-run");
      find("#compare-none").hidden = found.length > 0;
      find("#compare-form").hidden = found.length === 0;
      select.replaceChildren(
        ...found.map(({ name, compared }) =>
          made("option", `${name}${compared ? ` (compared ${new Date(compared * 1000).toLocaleString()})` : ""}`, { value: name }),
        ),
      );
      if (!found.length) return;
      const latest = found.reduce((one, other) => (other.compared > one.compared ? other : one));
      const run = query.get("run") ?? latest.name;
      select.value = run;
      if (!this.cards.length) await this.last(run);
    } catch (error) {
      trouble(error.message);
    }
  },
  async last(run) {
    this.leave();
    const answers = find("#compare-answers");
    const { html } = await ask("compare/show", { name: run });
    const place = made("article", "", { class: "drawn", "aria-label": `The last comparison of ${run}` });
    show(place, html || "<p>This run was not compared yet.</p>");
    answers.replaceChildren(place);
  },
  compare(form) {
    this.leave();
    find("#compare-answers").replaceChildren();
    const question = { run: form.elements.run.value };
    if (form.elements.texts.value.trim()) question.texts = form.elements.texts.value;
    if (!form.elements.loss.checked) question.no_loss = "yes";
    this.cards = [card("compare", question, question.run)];
  },
};

find("#compare-form").addEventListener("submit", (event) => {
  event.preventDefault();
  compare.compare(event.target);
});
find("#compare-run").addEventListener("change", (event) => {
  compare.leave();
  go("compare", new URLSearchParams([["run", event.target.value]]));
});

// ---- which room is shown

const rooms = { runs, plan, explain, compare };

function enter() {
  const { room, query } = address();
  if (!(room in rooms)) {
    history.replaceState(null, "", "#runs");
    return enter();
  }
  for (const name of Object.keys(rooms)) find(`#${name}`).hidden = name !== room;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${room}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${find(`#${room} h1`).textContent} - oomless studio`;
  for (const other of [plan, explain, compare]) if (rooms[room] !== other) other.leave();
  rooms[room].enter(query);
}

// The pointer reads a chart: what a column says is shown beside it, at once.
const reading = find("#reading");
document.addEventListener("pointermove", (event) => {
  const said = event.target.closest?.("svg .hit, svg .dot")?.querySelector("title")?.textContent;
  reading.hidden = !said;
  if (!said) return;
  reading.textContent = said;
  const { width, height } = reading.getBoundingClientRect();
  const left = event.clientX + 16 + width > innerWidth ? event.clientX - 16 - width : event.clientX + 16;
  reading.style.left = `${Math.max(4, left)}px`;
  reading.style.top = `${Math.max(4, Math.min(event.clientY + 12, innerHeight - height - 4))}px`;
});

const token = address().room.match(/^token=(.+)$/);
if (token) {
  localStorage.setItem(KEY, token[1]);
  history.replaceState(null, "", "#runs");
}
window.addEventListener("hashchange", enter);
enter();
