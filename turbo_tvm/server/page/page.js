// The dashboard: fetches /dashboard/state once a second and draws it; sends texts to /embed, /predict or /embed_all.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const MOST_BARS = 24;
let state = null;

function headers() {
  const key = $("key").value;
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function refresh() {
  try {
    const response = await fetch("dashboard/state", { headers: headers() });
    if (!response.ok) throw new Error((await response.json()).error || response.status);
    state = await response.json();
    say("live", false);
    draw();
  } catch (error) {
    say(String(error.message || error), true);
  }
}

function say(text, bad) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function chosen() {
  const names = state.models.map((model) => model.name);
  const select = $("model");
  if (names.join("\n") !== [...select.options].map((option) => option.value).join("\n")) {
    const before = select.value;
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    if (names.includes(before)) select.value = before;
  }
  return state.models.find((model) => model.name === select.value);
}

function draw() {
  const model = chosen();
  if (!model) return;
  drawNumbers(model);
  drawThroughput(model);
  drawBatches(model);
}

function drawNumbers(model) {
  const now = Math.floor(model.now);
  const last = model.seconds.filter(([second]) => second >= now - 10 && second < now);
  const rate = sum(last.map(([, requests]) => requests)) / 10;
  const tokens = sum(last.map(([, , count]) => count)) / 10;
  const busy = sum(last.map(([, , , seconds]) => seconds)) / 10;
  const numbers = {
    "requests / s": rate.toFixed(1),
    "tokens / s": Math.round(tokens).toLocaleString(),
    "busy": `${Math.min(100, 100 * busy).toFixed(0)} %`,
    "p50": milliseconds(model.latency_s["50"]),
    "p95": milliseconds(model.latency_s["95"]),
    "p99": milliseconds(model.latency_s["99"]),
    "waiting": `${model.waiting} of ${model.max_queue}`,
    "memory arena": `${(model.arena_bytes / 2 ** 20).toFixed(1)} MiB`,
    "padding": `${(100 * model.padding_waste).toFixed(1)} %`,
    "answered": model.answered.toLocaleString(),
    "from the cache": model.cache_hits.toLocaleString(),
    "refused": model.rejected.toLocaleString(),
  };
  $("numbers").replaceChildren(...Object.entries(numbers).map(([name, value]) => {
    const box = document.createElement("div");
    const number = document.createElement("b");
    const label = document.createElement("span");
    number.textContent = value;
    label.textContent = name;
    box.append(number, label);
    return box;
  }));
}

function drawThroughput(model) {
  const width = 720, height = 120, span = 180, now = Math.floor(model.now);
  const bySecond = new Map(model.seconds.map(([second, requests]) => [second, requests]));
  const values = Array.from({ length: span }, (_, i) => bySecond.get(now - span + i) || 0);
  const most = Math.max(1, ...values);
  const points = values.map((value, i) => `${(i * width / (span - 1)).toFixed(1)},${(height - value / most * (height - 14)).toFixed(1)}`);
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", `M${points.join("L")}`);
  const label = document.createElementNS(SVG, "text");
  label.setAttribute("x", "4");
  label.setAttribute("y", "11");
  label.textContent = `${most} requests / s`;
  $("throughput").replaceChildren(path, label);
}

function drawBatches(model) {
  const longest = Math.max(1, ...model.batches.flatMap((batch) => batch.lengths));
  $("batches").replaceChildren(...model.batches.slice().reverse().map((batch) => {
    const box = document.createElement("div");
    box.className = "batch";
    box.title = `lengths: ${batch.lengths.join(", ")}`;
    const title = document.createElement("p");
    title.textContent = `${batch.lengths.length} in ${milliseconds(batch.seconds)}`;
    const tokens = document.createElement("p");
    tokens.textContent = `${sum(batch.lengths)} tokens, ${batch.rows} rows`;
    const bars = batch.lengths.slice().sort((a, b) => b - a).slice(0, MOST_BARS).map((length) => {
      const bar = document.createElement("i");
      bar.style.width = `${100 * length / longest}%`;
      return bar;
    });
    box.append(title, tokens, ...bars);
    return box;
  }));
}

async function send(event) {
  event.preventDefault();
  const model = state && chosen();
  if (!model) return;
  const texts = $("texts").value.split("\n").filter((line) => line.trim());
  const base = `models/${encodeURIComponent(model.name)}`;
  const [path, inputs] = {
    embedding: ["embed", texts],
    scores: ["predict", texts.map((text) => [text])],
    tokens: ["embed_all", texts],
  }[model.kind];
  const started = performance.now();
  const response = await fetch(`${base}/${path}`, { method: "POST", headers: headers(), body: JSON.stringify({ inputs }) });
  const answer = await response.json();
  $("took").textContent = `${(performance.now() - started).toFixed(1)} ms`;
  $("answer").textContent = response.ok ? describe(model.kind, texts, answer) : answer.error;
  $("answer").classList.toggle("bad", !response.ok);
}

function describe(kind, texts, answer) {
  if (kind !== "embedding") return JSON.stringify(answer, null, 1);
  const lines = texts.map((text, i) =>
    `${text.slice(0, 60)}\n  ${answer[i].length} numbers: ${answer[i].slice(0, 6).map((x) => x.toFixed(4)).join(", ")}, ...`);
  if (texts.length > 1) {
    lines.push("", "cosine similarity to the first:");
    texts.slice(1).forEach((text, i) => lines.push(`  ${dot(answer[0], answer[i + 1]).toFixed(4)}  ${text.slice(0, 60)}`));
  }
  return lines.join("\n");
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
const dot = (a, b) => sum(a.map((x, i) => x * b[i]));
const milliseconds = (seconds) => seconds == null ? "–" : `${(1e3 * seconds).toFixed(seconds < 0.01 ? 2 : 1)} ms`;

$("try").addEventListener("submit", send);
$("model").addEventListener("change", () => state && draw());
refresh().then(() => location.hash === "#try" && $("try").requestSubmit());
setInterval(refresh, 1000);
