// The live page of a router: reads /activity/stream and draws what it says. Nothing is estimated; only the dots on the
// lines and the growing ends of bars move between two messages.

const ENDED = 60, EVENTS = 100, SECONDS = 600; // what the router keeps too
const FERRY_SECONDS = 0.5; // a dot takes at least this long from one end of a line to the other
const MAX_FERRIES = 60, MAX_BLOCKS = 64;

const PHASES = {
  fetch: "the request's body, and its pictures from elsewhere",
  encode: "pictures are decoded, and the vision encoder runs",
  transfer: "from the first token of the embedding to the last",
  prefill: "the language model reads the prompt",
  decode: "the answer, token by token",
  answer: "transfer, prefill and, without a stream, decode: an instance of vLLM tells of none of them",
};

// What the router has told

const state = { requests: new Map(), events: new Map(), ttft: new Map(), transfer: new Map(), told: null, clock: 0 };

function apply(told) {
  if (told.first) for (const kept of [state.requests, state.events, state.ttft, state.transfer]) kept.clear();
  state.told = told;
  state.clock = told.now - performance.now() / 1000;
  for (const one of told.requests) state.requests.set(one.number, one);
  const kept = new Set([...told.running, ...ended().slice(0, ENDED).map((one) => one.number)]);
  for (const number of state.requests.keys()) if (!kept.has(number)) state.requests.delete(number);
  for (const one of told.events) state.events.set(one.id, one);
  for (const id of [...state.events.keys()].sort((a, b) => b - a).slice(EVENTS)) state.events.delete(id);
  for (const series of ["ttft", "transfer"]) {
    for (const sample of told.samples[series] ?? []) state[series].set(sample[0], sample);
    for (const second of state[series].keys()) if (second < told.now - SECONDS) state[series].delete(second);
  }
}

const now = () => state.clock + performance.now() / 1000;
const ended = () => [...state.requests.values()].filter((one) => one.ended !== null).sort((a, b) => b.ended - a.ended || b.number - a.number);
const running = () => state.told.running.map((number) => state.requests.get(number)).filter(Boolean);
const phaseOf = (request) => (request.ended === null ? request.phases.at(-1)[0] : "");

/** Returns the sum of a metric, over all labels or over those that contain a text. */
function total(name, label = "") {
  const keys = Object.keys(state.told.totals).filter((key) => key.split("{")[0] === name && key.includes(label));
  return keys.reduce((sum, key) => sum + state.told.totals[key], 0);
}

// Words

const count = (number, one, many = `${one}s`) => `${whole(number)} ${number === 1 ? one : many}`;
const digits = (value) => (value === 0 || value >= 10 ? Math.round(value).toString() : value.toFixed(value < 1 ? 2 : 1));
const spent = (seconds) => (seconds < 1 ? `${digits(seconds * 1000)} ms` : `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`);
const whole = (number) => number.toLocaleString("en");
const clockTime = (at) => new Date(Date.now() - (now() - at) * 1000).toLocaleTimeString("en-GB");
const isVllm = () => state.told.engine === "vllm";

function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; number >= 1000 && unit < units.length - 1; unit += 1) number /= 1000;
  return `${unit && number < 100 ? number.toFixed(1) : Math.round(number)} ${units[unit]}`;
}

/** Returns a worker's short name: its role and its place among those of the role; its id once it is gone. */
function nameOf(id) {
  const worker = state.told.workers.find((one) => one.id === id);
  if (!worker) return id;
  const alike = state.told.workers.filter((one) => one.role === worker.role);
  return `${worker.role} ${alike.indexOf(worker)}`;
}

function mediaOf(request) {
  const kinds = [[request.images, "picture"], [request.videos, "video"], [request.sounds, "sound"]];
  const parts = kinds.map(([number, word]) => number && count(number, word));
  return parts.filter(Boolean).join(", ") || "text";
}

// Elements

const $ = (id) => document.getElementById(id);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== false && child !== ""));
  return element;
}

const h = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const s = (name, attributes = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

function fit(text, width) {
  const most = Math.max(4, Math.floor(width / 6.6));
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

// Figures

function drawFigures() {
  const latest = [...state.ttft.values()].filter((sample) => sample[0] >= now() - 60);
  const mean = meanOf(latest), errors = total("embferry_router_chat_errors_total"), left = total("embferry_router_chat_aborted_total");
  const again = total("embferry_router_chat_second_attempts_total"), failed = total("embferry_router_worker_failures_total");
  const tiles = [
    [whole(state.told.under_way), "under way", `${count(total("embferry_router_chat_seconds_count"), "request")} ended`],
    [whole(errors), "errors", left ? `${count(left, "client")} left` : "no client left"],
    [mean === null ? "–" : spent(mean), "to the first token", latest.length ? "mean of the last minute" : "none in the last minute"],
  ];
  if (isVllm()) {
    const over = total("embferry_router_failovers_total", 'outcome="replaced"');
    tiles.push(
      [whole(total("embferry_router_encodes_total")), "items encoded", `${whole(total("embferry_router_encodes_skipped_total"))} more were there already`],
      [whole(over), "failovers", `${count(total("embferry_router_encode_retries_total"), "encode")} tried again`],
    );
  } else {
    const resumed = total("embferry_router_transfers_total", 'phase="resumed"');
    tiles.push(
      [whole(total("embferry_router_chat_transfer_seconds_count")), "embeddings moved", count(resumed, "resumed transfer")],
      [bytes(total("embferry_router_transfer_bytes_total")), "in finished answers", count(total("embferry_router_transfer_tokens_total"), "token")],
    );
  }
  tiles.push([whole(again), again === 1 ? "second attempt" : "second attempts", count(failed, "failed call", "failed calls") + " to workers"]);
  $("figures").replaceChildren(...tiles.map(([value, name, about]) => h("li", {}, h("b", {}, value), h("span", {}, name), h("small", {}, about))));
}

function meanOf(samples) {
  const many = samples.reduce((sum, sample) => sum + sample[1], 0);
  return many ? samples.reduce((sum, sample) => sum + sample[2], 0) / many : null;
}

// Fleet

const picture = { wires: new Map(), ferries: new Map(), layer: null };

function drawFleet() {
  const width = $("picture").clientWidth || 600, { workers } = state.told;
  const encoders = workers.filter((one) => one.role === "encode"), languages = workers.filter((one) => one.role !== "encode");
  const places = width >= 620 ? placesInColumns(width, encoders, languages) : placesInRows(width, encoders, languages);
  const wires = [];
  picture.wires.clear();
  for (const encoder of encoders) wires.push(wire("router", encoder.id, places, "encode"));
  for (const language of languages) wires.push(wire("router", language.id, places, "answer"));
  for (const encoder of encoders) for (const language of languages) wires.push(wire(encoder.id, language.id, places, "transfer"));
  const cards = [routerCard(places.at.get("router")), ...workers.map((worker) => workerCard(worker, places.at.get(worker.id)))];
  picture.layer = s("g", { "aria-hidden": "true" });
  const svg = $("picture");
  svg.setAttribute("viewBox", `0 0 ${width} ${places.height}`);
  svg.style.height = `${places.height}px`;
  svg.setAttribute("aria-label", spokenFleet(encoders, languages));
  svg.replaceChildren(...wires, ...cards, picture.layer);
  moveFerries(0);
}

function spokenFleet(encoders, languages) {
  const moving = running().filter((one) => phaseOf(one) === "transfer").length;
  const up = (all) => `${all.filter((one) => one.up).length} of ${all.length} up`;
  return `Encoders: ${up(encoders)}. Language ${isVllm() ? "instances" : "workers"}: ${up(languages)}. ${count(moving, "transfer")} under way.`;
}

const heightOf = (worker) => (worker.role === "language" && poolOf(worker.id) ? 104 : 62);
const poolOf = (id) => (state.told.pools ?? []).find((one) => one.worker === id);

function placesInColumns(width, encoders, languages) {
  const at = new Map(), gap = 14;
  const tall = (all) => all.reduce((sum, one) => sum + heightOf(one) + gap, -gap);
  const height = Math.max(tall(encoders) + 44, tall(languages) + 8, 140);
  const column = (all, x, w) => {
    let y = (height - tall(all)) / 2;
    for (const one of all) {
      at.set(one.id, { x, y, w, h: heightOf(one), sideways: true });
      y += heightOf(one) + gap;
    }
  };
  at.set("router", { x: 1, y: height / 2 - 48, w: Math.min(150, width * 0.19), h: 96, sideways: true });
  column(encoders, width * 0.33, Math.min(210, width * 0.25));
  column(languages, width - Math.min(260, width * 0.29) - 1, Math.min(260, width * 0.29));
  return { at, height };
}

function placesInRows(width, encoders, languages) {
  const at = new Map(), gap = 12, between = 46;
  at.set("router", { x: 1, y: 1, w: width - 2, h: 62 });
  let y = 63;
  for (const all of [encoders, languages]) {
    const columns = all.length > 1 ? 2 : 1, w = (width - 2 - gap * (columns - 1)) / columns;
    y += between;
    all.forEach((one, n) => {
      at.set(one.id, { x: 1 + (n % columns) * (w + gap), y: y + Math.floor(n / columns) * (heightOf(one) + gap), w, h: heightOf(one) });
    });
    const lines = Math.ceil(all.length / columns);
    y += lines ? lines * heightOf(all[0]) + (lines - 1) * gap : 0;
  }
  return { at, height: y + 2 };
}

function wire(from, to, places, kind) {
  const a = places.at.get(from), b = places.at.get(to);
  const using = running().filter((one) => usesWire(one, from, to, kind)).length;
  let d;
  if (kind === "answer" && a.sideways) { // below the encoders
    const x1 = a.x + a.w / 2, y1 = a.y + a.h, x2 = b.x, y2 = b.y + b.h * 0.8, low = places.height - 2;
    d = `M${x1},${y1} C${x1},${low} ${x1 + 40},${low} ${(x1 + x2) / 2},${low} S${x2 - 50},${y2} ${x2},${y2}`;
  } else if (a.sideways) {
    const x1 = a.x + a.w, y1 = a.y + a.h / 2, x2 = b.x, y2 = b.y + b.h / 2, bend = (x2 - x1) / 2;
    d = `M${x1},${y1} C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`;
  } else {
    const x1 = a.x + a.w / 2, y1 = a.y + a.h, x2 = b.x + b.w / 2, y2 = b.y;
    d = kind === "answer" ? "" : `M${x1},${y1} C${x1},${y1 + 23} ${x2},${y2 - 23} ${x2},${y2}`;
  }
  const path = s("path", { d, class: `wire ${using ? `used ${kind}` : ""}` });
  if (kind === "transfer") picture.wires.set(`${from} ${to}`, path);
  return path;
}

function usesWire(request, from, to, kind) {
  const phase = phaseOf(request);
  if (kind === "encode") return phase === "encode" && request.encoders.includes(to);
  if (kind === "answer") return ["prefill", "decode", "answer"].includes(phase) && request.language === to;
  return phase === "transfer" && request.language === to && request.encoders.includes(from);
}

function routerCard(place) {
  const all = running(), fetching = all.filter((one) => phaseOf(one) === "fetch").length;
  const requests = count(state.told.under_way, "request"), fetched = `${fetching || "none"} fetching`;
  const lines = [["router", "name"], ...(place.sideways ? [[requests, ""], [fetched, "soft"]] : [[`${requests}, ${fetched}`, "soft"]])];
  return s("g", { transform: `translate(${place.x},${place.y})` },
    s("rect", { class: "card", width: place.w, height: place.h, rx: 12 }),
    lines.map(([text, kind], n) => s("text", { class: kind, x: 14, y: (place.sideways ? 28 : 25) + n * (place.sideways ? 24 : 22) }, text)));
}

function workerCard(worker, place) {
  const all = running(), at = worker.url.replace(/^https?:\/\//, "");
  const phases = (...names) => all.filter((one) => names.includes(phaseOf(one)));
  const here = (name) => phases(name).filter((one) => one.language === worker.id).length;
  let doing = `${phases("encode").filter((one) => one.encoders.includes(worker.id)).length} to encode`;
  if (worker.role !== "encode") doing = `${isVllm() ? `${here("answer")} answer` : `${here("prefill")} prefill`} · ${here("decode")} decode`;
  const health = worker.up ? "up" : isVllm() ? "down" : "late"; // workers without a lease are not listed at all
  return s("g", { transform: `translate(${place.x},${place.y})` },
    s("title", {}, `${worker.id}${worker.trouble && !worker.up ? `: ${worker.trouble}` : ""}`),
    s("rect", { class: `card ${health}`, width: place.w, height: place.h, rx: 12 }),
    s("circle", { class: `dot-${health}`, cx: 18, cy: 20, r: 5 }),
    s("text", { class: "name", x: 30, y: 25 }, nameOf(worker.id)),
    place.w > 175 && s("text", { class: "soft", x: place.w - 12, y: 25, "text-anchor": "end" }, fit(at.replace(/^127\.0\.0\.1/, ""), place.w - 115)),
    s("text", { class: "soft", x: 14, y: 47 }, fit(worker.up ? doing : worker.trouble, place.w - 20)),
    worker.role === "language" && poolOf(worker.id) ? poolCells(poolOf(worker.id), place.w) : []);
}

function poolCells(pool, width) {
  if (pool.error) return s("text", { class: "soft", x: 14, y: 78 }, fit(`pool: ${pool.error}`, width - 20));
  const cells = Math.min(pool.num_blocks, MAX_BLOCKS), scale = cells / pool.num_blocks;
  const used = Math.ceil(pool.used * scale), quarantined = Math.ceil(pool.quarantined * scale);
  const columns = Math.min(cells, 32), rows = Math.ceil(cells / columns);
  const step = Math.min(16, (width - 28) / columns), tall = 22 / rows, gap = Math.min(2, step * 0.25);
  const drawn = Array.from({ length: cells }, (_, n) => {
    const kind = n < used ? "used" : n < used + quarantined ? "quarantined" : "";
    const x = 14 + (n % columns) * step, y = 56 + Math.floor(n / columns) * tall;
    return s("rect", { class: `block ${kind}`, x, y, width: step - gap, height: tall - gap, rx: gap });
  });
  const held = pool.quarantined ? `, ${pool.quarantined} quarantined` : "";
  const words = `${pool.used} of ${count(pool.num_blocks, "block")} in use${held}`;
  return [...drawn, s("text", { class: "soft", x: 14, y: 94 }, fit(words, width - 16))];
}

const still = matchMedia("(prefers-reduced-motion: reduce)");

/** Moves a dot for each transfer to the part of the embedding that has arrived, and takes away those that are there. */
function moveFerries(seconds) {
  for (const one of state.requests.values()) {
    const phase = one.phases.find(([name, , end]) => name === "transfer" && (end === null || end > now() - 0.6));
    if (phase && !picture.ferries.has(one.number)) picture.ferries.set(one.number, { at: 0, wire: `${one.encoders.at(-1)} ${one.language}` });
  }
  const dots = [];
  for (const [number, ferry] of picture.ferries) {
    const request = state.requests.get(number), path = picture.wires.get(ferry.wire);
    const moves = request && phaseOf(request) === "transfer", transfer = request?.transfer;
    const goal = moves ? (transfer?.total_tokens > 0 ? transfer.tokens / transfer.total_tokens : 0) : 1;
    ferry.at = still.matches ? goal : Math.min(goal, Math.max(ferry.at, 0) + seconds / FERRY_SECONDS);
    if (!request) picture.ferries.delete(number);
    const isOver = !request || (request.outcome && request.outcome !== "answered") || (!moves && ferry.at >= 1);
    if (isOver || !path) continue;
    const point = path.getPointAtLength(path.getTotalLength() * ferry.at), resumes = (transfer?.transfers ?? 1) - 1;
    dots.push({ x: point.x, y: point.y, resumes });
  }
  const free = (dot, n) => dot.resumes > 0 && !dots.slice(0, n).some((one) => one.resumes && Math.abs(one.x - dot.x) < 30 && Math.abs(one.y - dot.y) < 12);
  picture.layer?.replaceChildren(
    ...dots.slice(0, MAX_FERRIES).map(({ x, y }) => s("circle", { class: "ferry", cx: x, cy: y, r: 6 })),
    ...dots.slice(0, MAX_FERRIES).filter(free).map(({ x, y, resumes }) => s("text", { class: "ferry-text", x: x + 9, y: y - 6 }, `↻${resumes}`)),
  );
}

// Requests

const rows = new Map(); // by number
let open = null; // the number of the request whose timeline is shown

let scale = 1; // seconds that the longest bar can show

function drawRequests() {
  const all = [...running(), ...ended()], list = $("rows");
  scale = niceCeiling(Math.max(0.05, ...all.map((one) => (one.ended ?? now()) - one.began)));
  for (const [number, row] of rows) if (!state.requests.has(number)) { row.item.remove(); rows.delete(number); }
  all.forEach((request, place) => {
    const row = rows.get(request.number) ?? newRow(request.number);
    fillRow(row, request);
    if (list.children[place] !== row.item) list.insertBefore(row.item, list.children[place] ?? null);
  });
  $("no-request").hidden = all.length > 0 || state.told.missing.length > 0;
  $("legend").hidden = all.length === 0;
  for (const item of $("legend").children) item.hidden = isVllm() ? ["transfer", "prefill"].includes(item.textContent) : item.textContent === "answer";
  const rest = state.told.under_way - state.told.running.length;
  $("more").hidden = rest <= 0;
  $("more").textContent = `${count(rest, "more request")} under way`;
}

/** Lets the bars of requests under way grow between two messages. */
function growRows() {
  const all = running();
  if (all.some((one) => now() - one.began > scale)) return drawRequests();
  for (const request of all) {
    const row = rows.get(request.number);
    if (!row?.bar.lastChild) continue;
    row.bar.lastChild.style.width = `${(100 * (now() - request.phases.at(-1)[1])) / scale}%`;
    row.time.textContent = spent(now() - request.began);
  }
}

function newRow(number) {
  const bar = h("span", { class: "bar" }), what = h("span", { class: "what" }), time = h("span", { class: "spent" }), outcome = h("span", { class: "outcome" });
  const timeline = h("div", { class: "timeline", id: `timeline-${number}`, hidden: "" });
  const button = h("button", { class: "row", type: "button", "aria-expanded": "false", "aria-controls": timeline.id, on: { click: () => show(open === number ? null : number) } },
    h("span", { class: "number" }, `#${number}`), what, bar, time, outcome);
  const row = { item: h("li", {}, button, timeline), button, bar, what, time, outcome, timeline };
  rows.set(number, row);
  return row;
}

function fillRow(row, request) {
  const length = (request.ended ?? now()) - request.began, resumes = (request.transfer?.transfers ?? 1) - 1;
  row.bar.replaceChildren(...segments(request, request.began, scale));
  row.what.textContent = mediaOf(request);
  row.time.textContent = spent(length);
  const notes = [resumes > 0 && count(resumes, "resume"), request.attempts > 1 && count(request.attempts, "attempt")].filter(Boolean);
  const isRunning = request.ended === null;
  row.outcome.textContent = [isRunning ? phaseOf(request) : request.outcome, ...notes].join(" · ");
  row.outcome.className = `outcome ${isRunning ? "running" : ["answered", "client left"].includes(request.outcome) ? "" : "failed"}`;
  if (open === request.number) row.timeline.replaceChildren(...timelineOf(request));
}

/** Returns the phases of a request as parts of a bar that begins at a time and is so many seconds long. */
function segments(request, begin, length) {
  return request.phases.map(([name, from, to]) => {
    const part = h("i", { class: name, title: `${name} ${spent((to ?? now()) - from)}` });
    part.style.left = `${(100 * (from - begin)) / length}%`;
    part.style.width = `${(100 * ((to ?? now()) - from)) / length}%`;
    return part;
  });
}

function show(number) {
  open = number;
  for (const [each, row] of rows) {
    row.timeline.hidden = each !== number;
    row.button.setAttribute("aria-expanded", String(each === number));
    if (each === number) row.timeline.replaceChildren(...timelineOf(state.requests.get(number)));
  }
}

function timelineOf(request) {
  const length = Math.max(0.001, (request.ended ?? now()) - request.began), { transfer } = request;
  const lines = request.phases.map((phase) => {
    const [name, from, to] = phase;
    const bar = h("span", { class: "bar" }, segments({ phases: [phase] }, request.began, length));
    bar.style.display = "block";
    return h("tr", {}, h("td", {}, h("i", { class: `swatch ${name}` }), name), h("td", {}, `+${spent(from - request.began)}`), h("td", {}, h("b", {}, spent((to ?? now()) - from))), h("td", {}, bar));
  });
  const facts = [
    ["asked", `${request.path}, ${mediaOf(request)}, ${request.streams ? "streamed" : "not streamed"}, at ${clockTime(request.began)}`],
    ["encoder", request.encoders.map(described).join(", ")],
    ["language", request.language && described(request.language)],
    ["transfer", transfer && transferred(transfer)],
    ["attempts", request.attempts > 1 && String(request.attempts)],
    ["first token", request.ttft !== null && `after ${spent(request.ttft)}`],
    ["outcome", request.outcome],
    ["log", `number=${request.number} in the router's log`],
  ];
  return [h("table", {}, h("tbody", {}, lines)), h("dl", {}, facts.filter(([, text]) => text).flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]))];
}

const described = (id) => (nameOf(id) === id ? id : `${nameOf(id)} (${id})`);

function transferred(told) {
  const resumes = told.transfers - 1;
  const times = resumes > 0 ? `1 initial and ${count(resumes, "resumed transfer")}` : "1 transfer";
  return `${whole(told.tokens)} of ${count(told.total_tokens, "token")}, ${bytes(told.bytes)} in all, over ${told.transport}, in ${times}`;
}

function niceCeiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 5, 7.5, 10].map((one) => one * power).find((one) => one >= value * 0.999) ?? value;
}

// Times

let shownSeconds = 120;

function drawTimes() {
  drawSeries("ttft", "ttft", "time to the first token");
  $("transfer-figure").hidden = isVllm(); // the router before vLLM does not see transfers
  if (!isVllm()) drawSeries("transfer", "sent", "transfer time");
}

function drawSeries(id, kind, words) {
  const svg = $(id), width = svg.clientWidth || 300, height = 118, bottom = 96, left = 50;
  const samples = [...state[id].values()].filter((one) => one[0] > now() - shownSeconds);
  const top = niceCeiling(Math.max(0.001, ...samples.map((one) => one[4])));
  const x = (second) => width - 6 - ((now() - second) / shownSeconds) * (width - left - 6), y = (value) => bottom - (value / top) * (bottom - 10);
  const marks = samples.map(([second, many, sum, low, high]) => s("g", {},
    s("line", { class: "range", x1: x(second), x2: x(second), y1: y(low), y2: y(high) }), s("circle", { cx: x(second), cy: y(sum / many), r: 2.6 })));
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.height = `${height}px`;
  svg.setAttribute("class", kind);
  const mean = meanOf(samples), most = Math.max(...samples.map((one) => one[4]));
  const summary = mean === null ? "none yet" : `mean ${spent(mean)}, most ${spent(most)}`;
  svg.setAttribute("aria-label", `${words} over ${shownSeconds / 60} minutes: ${summary}`);
  const levels = mean === null ? [0] : [0, top / 2, top];
  svg.replaceChildren(
    ...levels.map((level) => s("g", {}, s("line", { class: "axis", x1: left, x2: width - 2, y1: y(level), y2: y(level) }), s("text", { class: "soft", x: left - 6, y: y(level) + 4, "text-anchor": "end" }, level ? spent(level).replace(/(\.\d*?)0+ /, "$1 ").replace(". ", " ") : "0"))),
    ...marks,
    s("text", { class: "soft", x: left, y: height - 4 }, `${shownSeconds / 60} min ago`), s("text", { class: "soft", x: width - 2, y: height - 4, "text-anchor": "end" }, "now"));
  $(`${id}-now`).textContent = summary;
}

// Events

const SENTENCES = {
  resumed: (e) => ["moved", count(e.count, "resume"), `The pool of ${nameOf(e.worker)} holds a part at a time.`],
  second_attempt: (e) => ["warn", "second attempt", `After ${e.code}${e.worker ? ` at ${nameOf(e.worker)}` : ""}.`],
  encode_retry: (e) => ["warn", "encode tried again", `At ${nameOf(e.worker)}.`],
  failover: (e) => ["warn", "failover", `The transfer goes on from ${nameOf(e.worker)}.`],
  fallback: () => ["warn", "sent undivided", "The language instance encodes this one itself."],
  error: (e) => ["bad", e.code, "The client was told."],
  client_left: () => ["", "client left", "Its work was ended."],
  worker_failed: (e) => ["bad", "a call failed", `To ${nameOf(e.worker)}: ${e.reason}.`],
  damaged: (e) => ["warn", "damaged message", `Between the router and ${nameOf(e.worker)}; it does not count.`],
  worker_found: (e) => ["good", "worker found", described(e.worker)],
  worker_lost: (e) => ["bad", "worker lost", `${e.role} ${e.worker}${e.reason ? `: ${e.reason}` : ""}`],
};

function drawEvents() {
  const latest = [...state.events.values()].sort((a, b) => b.at - a.at || b.id - a.id);
  $("no-event").hidden = latest.length > 0;
  $("log").replaceChildren(...latest.map((event) => {
    const [kind, title, text] = SENTENCES[event.kind]?.(event) ?? ["", event.kind, ""];
    const times = event.count > 1 && event.kind !== "resumed" ? ` ×${event.count}` : "";
    const about = event.request === null ? "" : ` #${event.request}`;
    return h("li", {}, h("time", {}, clockTime(event.at)), h("p", {}, h("b", { class: kind }, title + times), about, text && ` – ${text}`));
  }));
}

// The whole

function draw() {
  if (!state.told) return;
  const { told } = state, models = [...new Set(told.workers.flatMap((one) => one.models))];
  $("about").textContent = `${models.join(", ") || "no model yet"} · ${told.router}`;
  $("missing").hidden = told.missing.length === 0;
  $("missing").textContent = `Not ready: ${told.missing.join("; ")}`;
  $("command").textContent = firstQuestion(models[0]);
  document.title = `${told.under_way ? `(${told.under_way}) ` : ""}embferry`;
  for (const part of [drawFigures, drawFleet, drawRequests, drawTimes, drawEvents]) part();
}

function firstQuestion(model) {
  const picture = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAgMAAADXB5lNAAAACVBMVEXr6+HcKCgoUNyyJonRAAAAh0lEQVR42t3QsQ3CMBRF0ZNA+jSsQMEUWYKeUdiHJTIGO9C4onEkKGw5CUWkIJrwJDf3v2vLn61kB+fjvYAaB003Ax3tFDTSKaCVWqMyS52H7QgqsF9SPkEqV2uUL8AAXmuUVB4mjR7C0h2BXMt7iIicrnhe6jQNs2cfYjHSNm4///4fg+3kDYz6E1yPwhX/AAAAAElFTkSuQmCC";
  const content = [{ type: "image_url", image_url: { url: picture } }, { type: "text", text: "what colour is the circle?" }];
  const body = JSON.stringify({ model, max_tokens: 16, messages: [{ role: "user", content }] });
  const key = keyText() ? " -H 'Authorization: Bearer YOUR-KEY'" : "";
  return `curl -sS ${new URL("v1/chat/completions", document.baseURI)}${key} -H 'Content-Type: application/json' -d '${body}'`;
}

let lastFrame = 0, lastSecond = 0;

function frame(time) {
  const seconds = Math.min(0.1, (time - lastFrame) / 1000);
  lastFrame = time;
  if (state.told && !document.hidden) {
    if (!still.matches) growRows();
    if (picture.ferries.size && !still.matches) moveFerries(seconds);
    if (time - lastSecond > 1000) {
      lastSecond = time;
      for (const part of [drawFigures, drawTimes, ...(still.matches ? [drawRequests] : [])]) part();
    }
  }
  requestAnimationFrame(frame);
}

// The stream

const KEY = "embferry key"; // in sessionStorage: of this tab alone
const keyText = () => sessionStorage.getItem(KEY) ?? "";
let connection = null, pause = 1;

function say(is, words) {
  $("state").dataset.is = is;
  $("state").textContent = words;
}

function askForKey(trouble) {
  sessionStorage.removeItem(KEY);
  say("waiting", "API key needed");
  document.querySelector("main").hidden = true;
  $("key").hidden = false;
  $("key-trouble").textContent = trouble;
  $("key-text").focus();
}

async function watch() {
  connection?.abort();
  const mine = (connection = new AbortController());
  const headers = keyText() ? { Authorization: `Bearer ${keyText()}` } : {};
  let why = "the router is gone";
  try {
    const response = await fetch("activity/stream", { headers, signal: mine.signal, cache: "no-store" });
    if (response.status === 401) return askForKey(keyText() ? "That key is not accepted." : "");
    if (response.ok) await read(response.body.getReader());
    else why = (await response.json()).error.message;
  } catch (error) {
    if (mine.signal.aborted) return;
    if (!(error instanceof TypeError || error instanceof SyntaxError)) throw error; // those of fetch, and of JSON
  }
  say("waiting", `${why}; trying again`);
  setTimeout(() => mine === connection && !document.hidden && watch(), 1000 * pause);
  pause = Math.min(10, pause * 2);
}

async function read(reader) {
  const decoder = new TextDecoder();
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const events = text.split("\n\n");
    text = events.pop();
    const told = events.filter((event) => event.startsWith("data: ")).map((event) => JSON.parse(event.slice(6)));
    told.forEach(apply);
    if (!told.length) continue;
    pause = 1;
    say("live", "live");
    document.querySelector("main").hidden = false;
    $("key").hidden = true;
    draw();
  }
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key-text").value.trim());
  $("key-text").value = "";
  watch();
});
$("copy").addEventListener("click", async () => {
  await navigator.clipboard?.writeText($("command").textContent);
  $("copy").textContent = "Copied";
});
$("window").addEventListener("change", (event) => {
  shownSeconds = Number(event.target.value);
  drawTimes();
});
$("legend").append(...Object.entries(PHASES).map(([name, about]) => h("li", { title: about }, h("i", { class: name }), name)));
new ResizeObserver(draw).observe($("fleet"));
document.addEventListener("visibilitychange", () => (document.hidden ? connection?.abort() : watch())); // an unseen page costs nothing
requestAnimationFrame(frame);
watch();
