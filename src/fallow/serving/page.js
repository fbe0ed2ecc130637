// A chat with the server that this page came from, and of every token of the answers a picture of the
// neurons that were active for it: see fallow_activity in the how-to on serving.
"use strict";

const $ = (id) => document.getElementById(id);
const MEGA = 1e6;
let key = "";  // kept here and nowhere else
let model = "", plan = null;
let talk = [];  // messages so far
let running = null;  // the AbortController of an answer that is being made
let shown = null;  // what the picture shows: a token's activity
const hint = $("log").firstElementChild;

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// The server ----------------------------------------------------------------------------------------

async function request(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw options.signal?.aborted ? error : new Error("The server does not answer: is fallow serve still running?");
  });
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  const said = await response.json().catch(() => null);
  throw new Error(said?.error?.message ?? `the server answered with status ${response.status}`);
}

function askForKey() {
  $("key").hidden = false;
  $("ask").hidden = true;
  $("key-field").focus();
}

async function connect() {
  try {
    const card = (await (await request("v1/models")).json()).data[0];
    [model, plan] = [card.id, card.plan];
    $("about").textContent = plan ? `${model}, plan ${plan}` : `${model}, no plan`;
    $("switch").hidden = !plan;
    $("key").hidden = true;
    $("ask").hidden = false;
    $("question").focus();
    showMemory();
  } catch (error) {
    $("about").textContent = error.message;
  }
}

// The chunks of a streamed answer.
async function* chunks(response) {
  let text = "";
  for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const chunk = JSON.parse(event.slice("data: ".length));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function showMemory() {
  try {
    const figures = await (await request("metrics")).text();
    const found = figures.match(/^process_resident_memory_bytes (\S+)/m);
    if (found) $("memory").textContent = (found[1] / MEGA).toFixed(0);
  } catch { /* What the server says of it is no part of the answer. */ }
}

// Answers -------------------------------------------------------------------------------------------

// An answer on the page, and its figures as they grow.
class Answer {
  constructor() {
    this.box = element("article", "answer");
    this.paragraph = this.box.appendChild(element("p", ""));
    this.below = this.box.appendChild(element("small", "", "reading"));
    this.withPlan = $("with-plan").checked && plan !== null;
    this.text = "";
    this.decoded = this.bytes = 0;  // tokens of passes of their own, and what these read
    this.shares = [];  // of neurons that were active, of every token
    this.told = { speed: "–", bytes: "–", skipped: "–", note: "" };  // beside the picture of its tokens
    $("log").append(this.box);
  }

  add(text, activities) {
    this.text += text;
    for (const { active_per_layer: active, bytes_read: bytes } of activities) {
      this.start ??= performance.now();
      this.shares.push(mean(active));
      if (bytes === null) continue;  // read with the prompt
      this.decoded += 1;
      this.bytes += bytes;
    }
    if (!text) return;
    if (!activities.length) return this.paragraph.append(text);
    // A space before a word stays outside of its box, which would else begin at the end of a line.
    const space = text.trim() ? text.slice(0, text.length - text.trimStart().length) : "";
    this.paragraph.append(space, this.token(text, space.length, activities));
  }

  // Of a text, which begins with so many spaces that are on the page already.
  token(text, spaces, activities) {
    const token = element("span", "", text.slice(spaces));
    const activity = merged(activities);
    const share = mean(activity.active);
    token.style.setProperty("--share", share.toFixed(4));
    // All colours lie within two standard deviations of the mean, so that a few tokens far off leave some
    // to the others; differences of less than a percent have little of them.
    const middle = mean(this.shares);
    const deviation = Math.sqrt(mean(this.shares.map((each) => (each - middle) ** 2)));
    const spread = Math.max(0.01, 2 * deviation);
    this.box.style.setProperty("--low", (deviation > 1e-6 ? middle - spread : middle).toFixed(4));
    this.box.style.setProperty("--high", (middle + spread).toFixed(4));
    token.tabIndex = -1;
    token.show = () => show({ ...activity, answer: this, token, text, share });
    token.show();
    return token;
  }

  figures(speed = (1000 * this.decoded) / (performance.now() - this.start)) {
    if (!this.shares.length) return "";
    const skipped = percent(1 - mean(this.shares));
    this.told.skipped = skipped;
    const said = [`${this.shares.length} tokens`];
    if (this.decoded) {
      const bytes = (this.bytes / this.decoded / MEGA).toFixed(1);
      this.told.speed = speed.toFixed(1);
      this.told.bytes = bytes;
      said.push(`${speed.toFixed(1)} tokens/s`, `${bytes} MB per token`);
    }
    const [least, most] = [1 - Math.max(...this.shares), 1 - Math.min(...this.shares)];
    said.push(`${skipped} of neurons skipped${most - least > 0.001 ? ` (${percent(least)} to ${percent(most)})` : ""}`);
    if (plan) said.push(this.withPlan ? "with the plan" : "without the plan");
    return said.join(" · ");
  }

  // Its figures beside the picture, where that is of one of its tokens.
  tell() {
    if (shown?.answer !== this) return;
    for (const [id, text] of Object.entries(this.told)) $(id).textContent = text;
  }

  // Why neurons were skipped or not, in a sentence.
  note() {
    if (this.shares.length === 0) return "";
    if (mean(this.shares) < 0.9995) {
      if (this.withPlan) return "";
      return `${plan ? "Without its plan" : "The file has no plan:"} neurons that the activation makes zero are skipped.`;
    }
    if (this.withPlan) return "The plan leaves out no neurons of this model.";
    if (plan) return "Without its plan every neuron is computed.";
    return "Every neuron is computed: the file has no plan, and its activation makes no zeros. To skip some: " +
      "fallow calibrate MODEL --rule topk --sparsity 0.5 -o half.plan, then fallow serve MODEL --plan half.plan";
  }
}

// Tokens whose text came together, as one.
function merged(activities) {
  const active = activities[0].active_per_layer.map((_, l) => mean(activities.map((a) => a.active_per_layer[l])));
  const bins = activities[0].active_bins.map((row, l) =>
    row.map((_, b) => mean(activities.map((a) => a.active_bins[l][b]))));
  return { active, bins };
}

async function ask(question) {
  const log = $("log");
  hint.remove();
  log.append(element("p", "asked", question));
  talk.push({ role: "user", content: question });
  const answer = new Answer();
  const [mine, thisTalk] = [new AbortController(), talk];
  busy(mine);
  try {
    const response = await request("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      signal: mine.signal,
      body: JSON.stringify({
        model, messages: talk, stream: true, stream_options: { include_usage: true }, fallow_activity: true,
        fallow_plan: $("with-plan").checked, temperature: $("temperature").valueAsNumber,
        max_tokens: $("longest").valueAsNumber,
      }),
    });
    let speed;
    for await (const chunk of chunks(response)) {
      const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
      answer.add(chunk.choices[0]?.delta?.content ?? "", chunk.fallow_activity ?? []);
      speed = chunk.usage?.sparsity.decode_tps || undefined;
      answer.below.textContent = answer.figures(speed) || "reading";
      answer.tell();
      if (follows) log.scrollTop = log.scrollHeight;
    }
    answer.told.note = answer.note();
    answer.tell();
    if (!answer.shares.length) answer.below.textContent = "The model ended its answer at once.";
  } catch (error) {
    if (mine.signal.aborted) answer.below.textContent = [answer.figures(), "stopped"].filter(Boolean).join(" · ");
    else answer.box.append(element("p", "error", error.message));
    if (!answer.text && thisTalk === talk && !$("question").value) $("question").value = question;  // to send it again
  }
  if (answer.text) thisTalk.push({ role: "assistant", content: answer.text });
  else thisTalk.pop();
  const last = answer.paragraph.querySelector("span:last-of-type");
  if (last) last.tabIndex = 0;
  busy(null);
  log.scrollTop = log.scrollHeight;
  showMemory();
}

function busy(controller) {
  running = controller;
  $("stop").hidden = !controller;
  $("send").hidden = !!controller;
  $("log").ariaBusy = String(!!controller);
}

// The picture ---------------------------------------------------------------------------------------

let waits = false;

function show(what) {
  shown?.token.classList.remove("shown");
  shown = what;
  shown.token.classList.add("shown");
  shown.answer.tell();
  if (waits) return;
  waits = true;
  requestAnimationFrame(() => {
    waits = false;
    draw();
  });
}

// A row of cells for each layer, the first on top, and at its right the layer's share.
function draw() {
  const canvas = $("layers"), scale = devicePixelRatio;
  canvas.hidden = !shown;
  $("which").textContent = shown ? `${JSON.stringify(shown.text)}: ${percent(shown.share)} of neurons active` : "";
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = width * scale;
  canvas.height = height * scale;
  if (!shown) return;
  const { text, share, active, bins } = shown;
  const layers = active.map(percent).join(", ");
  canvas.ariaLabel = `Active neurons for ${JSON.stringify(text)}, by layer: ${layers}`;
  const style = getComputedStyle(canvas);
  const [ink, bar, ...triples] = ["--dim", "--accent", "--idle", "--half", "--busy"].map((name) =>
    style.getPropertyValue(name).trim());
  const colours = triples.map((triple) => triple.split(" ").map(Number));
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.textBaseline = "middle";
  const row = Math.min(height / bins.length, 28), gap = row > 6 ? 1.5 : 0.5;
  const hasText = row >= 10;
  const [left, right] = hasText ? [26, 92] : [0, 48];
  const cell = (width - left - right) / bins[0].length;
  context.font = `${Math.min(11, row - 1)}px system-ui, sans-serif`;
  bins.forEach((shares, l) => {
    const y = l * row;
    shares.forEach((value, b) => {
      context.fillStyle = colourOf(value, colours);
      context.fillRect(left + b * cell, y, cell - (cell > 4 ? 1 : 0), row - gap);
    });
    const room = hasText ? 44 : right - 8;
    context.fillStyle = bar;
    context.fillRect(width - right + 8, y + row * 0.25, Math.max(1, room * active[l]), (row - gap) * 0.5);
    if (!hasText) return;
    context.fillStyle = ink;
    context.textAlign = "right";
    context.fillText(l, left - 6, y + (row - gap) / 2);
    context.fillText(`${(100 * active[l]).toFixed(0)} %`, width, y + (row - gap) / 2);
  });
}

function colourOf(value, [idle, half, busy]) {
  const [from, to, way] = value < 0.5 ? [idle, half, 2 * value] : [half, busy, 2 * value - 1];
  return `rgb(${from.map((part, i) => Math.round(part + way * (to[i] - part))).join(" ")})`;
}

// What people do ------------------------------------------------------------------------------------

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (running || !question || !$("ask").reportValidity()) return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key-field").value.trim();
  $("key-field").value = "";
  connect();
});
$("new").addEventListener("click", () => {
  running?.abort();
  talk = [];
  shown = null;
  for (const id of ["speed", "bytes", "skipped"]) $(id).textContent = "–";
  $("note").textContent = "";
  $("log").replaceChildren(hint);
  draw();
  $("question").focus();
});
for (const kind of ["pointerover", "focusin", "click"])
  $("log").addEventListener(kind, (event) => event.target.show?.());
// Of an answer's tokens one is in the order of the Tab key; arrows go to the others.
$("log").addEventListener("keydown", (event) => {
  const next = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" }[event.key];
  const to = next && event.target.show && event.target[next];
  if (!to) return;
  event.preventDefault();
  [event.target.tabIndex, to.tabIndex] = [-1, 0];
  to.focus();
});
new ResizeObserver(draw).observe($("layers"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
connect();
