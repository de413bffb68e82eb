"use strict";
// Texts are of users and models: they become text nodes, never markup. See viewer.py for the data.
const $ = (id) => document.getElementById(id);
const INDEX = JSON.parse($("index").textContent);
const ROW = 56; // height of a row in pixels, as in page.css
const OUTCOMES = {
  any: ["any", () => true],
  full: ["gain 1", (s) => s.gain === 1],
  part: ["gain between 0 and 1", (s) => s.gain > 0 && s.gain < 1],
  none: ["gain 0", (s) => s.gain === 0],
  unread: ["not readable", (s) => s.state === "unparsable"],
  failed: ["failed", (s) => s.state === "failed"],
};
const DIFFERENCES = {
  any: ["any", () => true],
  differs: ["answers differ", (a, b) => a.answer !== b.answer || a.state !== b.state],
  better: ["better than the other", (a, b) => a.gain > b.gain],
  worse: ["worse than the other", (a, b) => a.gain < b.gain],
  same: ["same gain", (a, b) => a.gain === b.gain],
};
const samples = INDEX.samples.map(([run, method, query, seed, gain, state, answer], place) => {
  const [user, id, input, gold] = INDEX.queries[query];
  const text = [INDEX.users[user], id, input, gold, answer].join("\n").toLowerCase();
  return { run, method, query, seed, gain, state, answer, place, user, id, input, gold, text };
});
const bySide = new Map(); // run and method → their samples
for (const s of samples) {
  const key = `${s.run}/${s.method}`;
  if (!bySide.has(key)) bySide.set(key, []);
  bySide.get(key).push(s);
}
const several = INDEX.runs.length > 1;
let pairs = []; // what the list shows: [sample, other sample or undefined]
let current = -1;

function make(tag, options = {}, ...children) {
  const { text, ...attributes } = options;
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value);
  }
  if (text !== undefined) node.textContent = text;
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const figure = (value, digits = 3) => (typeof value === "number" ? value.toFixed(digits) : "");
const sideName = (s) => (several ? `${INDEX.runs[s.run].name}: ` : "") + INDEX.methods[s.method];
const answerText = (s) =>
  s.state === "failed" ? "failed" : s.state === "unparsable" ? "not readable" : s.answer;
const mark = (s) => (s.gain === 1 ? "✓" : s.state === "failed" ? "!" : s.gain > 0 ? "~" : "✗");
const tone = (s) => (s.gain === 1 ? "good" : s.gain > 0 ? "" : "bad");

// ---- filters and list

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value, text })));
  if (chosen !== undefined) select.value = chosen;
}

function setUp() {
  const sides = [...bySide.keys()].map((key) => [key, sideName(bySide.get(key)[0])]);
  fill($("method"), [["", "all"], ...sides], INDEX.first[0]);
  fill($("other"), [["", "none"], ...sides], INDEX.first[1]);
  fill($("user"), [["", "all"], ...INDEX.users.map((name, place) => [String(place), name])]);
  fill($("outcome"), Object.entries(OUTCOMES).map(([key, [name]]) => [key, name]));
  const differences = Object.entries(DIFFERENCES).map(([key, [name]]) => [key, name]);
  fill($("difference"), differences, several ? "differs" : "any");
}

function partners() {
  // the other side's sample of the same query: of the same seed, else its first
  const found = new Map();
  for (const s of bySide.get($("other").value) ?? []) {
    found.set(`${s.query}/${s.seed}`, s);
    if (!found.has(s.query)) found.set(s.query, s);
  }
  return (s) => found.get(`${s.query}/${s.seed}`) ?? found.get(s.query);
}

function filter() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const user = $("user").value;
  const fits = OUTCOMES[$("outcome").value][1];
  const compares = $("other").value !== "";
  $("difference").disabled = !compares;
  const differs = DIFFERENCES[$("difference").value][1];
  const other = partners();
  const among = $("method").value === "" ? samples : bySide.get($("method").value);
  const kept = pairs[current]?.[0];
  pairs = [];
  for (const s of among) {
    if (user !== "" && s.user !== Number(user)) continue;
    if (!fits(s) || !words.every((word) => s.text.includes(word))) continue;
    const beside = compares ? other(s) : undefined;
    if (compares && (!beside || !differs(s, beside))) continue;
    pairs.push([s, beside]);
  }
  current = pairs.findIndex(([s]) => s === kept);
  $("count").textContent = summary(among.length);
  $("rows").style.height = `${pairs.length * ROW}px`;
  $("list").scrollTop = current > 0 ? (current - 1) * ROW : 0;
  draw();
}

function summary(total) {
  const mean = (side) => {
    const gains = pairs.map((pair) => pair[side]?.gain).filter((gain) => typeof gain === "number");
    return gains.length ? figure(gains.reduce((sum, gain) => sum + gain, 0) / gains.length) : "none";
  };
  const shown = `${pairs.length.toLocaleString("en")} of ${total.toLocaleString("en")} samples`;
  if ($("other").value === "") return `${shown}; mean gain ${mean(0)}`;
  return `${shown}; mean gain ${mean(0)}, of the other ${mean(1)}`;
}

function draw() {
  const list = $("list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const last = Math.min(pairs.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
  const rows = [];
  for (let place = first; place < last; place += 1) rows.push(row(place));
  $("rows").replaceChildren(...rows);
  if (current >= 0) list.setAttribute("aria-activedescendant", `row${current}`);
  else list.removeAttribute("aria-activedescendant");
}

function row(place) {
  const [s, other] = pairs[place];
  const top = `${INDEX.users[s.user]} · ${s.id} · ${sideName(s)}` + (s.seed ? ` · seed ${s.seed}` : "");
  const line = make("div", { dir: "auto" });
  line.append(make("span", { class: tone(s), text: `${mark(s)} ${answerText(s)}` }));
  if (other) {
    line.append(" | ", make("span", { class: tone(other), text: `${mark(other)} ${answerText(other)}` }));
  }
  line.append(make("span", { class: "soft", text: ` — gold: ${s.gold}` }));
  const node = make(
    "div",
    {
      class: "row", role: "option", id: `row${place}`, "aria-selected": String(place === current),
      "aria-posinset": place + 1, "aria-setsize": pairs.length,
    },
    make("div", { class: "top", text: top }),
    line,
  );
  node.style.top = `${place * ROW}px`;
  node.addEventListener("click", () => open(place));
  return node;
}

function move(place) {
  if (!pairs.length) return;
  current = Math.max(0, Math.min(pairs.length - 1, place));
  const list = $("list");
  const top = current * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  draw();
  show();
}

function open(place) {
  move(place);
  document.body.classList.add("open");
  $("detail").focus({ preventScroll: true });
}

function back() {
  document.body.classList.remove("open");
  $("list").focus({ preventScroll: true });
  draw();
}

// ---- one sample

function restore(value, texts) {
  if (Array.isArray(value)) return value.map((own) => restore(own, texts));
  if (value === null || typeof value !== "object") return value;
  if ("$" in value) return restore(texts[value.$], texts);
  return Object.fromEntries(Object.entries(value).map(([name, own]) => [name, restore(own, texts)]));
}

function load(query) {
  const block = $(`q${query}`);
  if (block === null) return null; // the page is still loading
  const { texts, ...rest } = JSON.parse(block.textContent);
  return restore(rest, texts);
}

function show() {
  if (current < 0) return;
  const [s, other] = pairs[current];
  const query = load(s.query);
  if (query === null) {
    document.addEventListener("DOMContentLoaded", show, { once: true });
    $("detail").replaceChildren(make("p", { class: "empty", text: "Loading" }));
    return;
  }
  const button = make("button", { id: "back", type: "button", text: "Back to the list" });
  button.addEventListener("click", back);
  const facts = make("dl", {});
  const fact = (name, text) => text && facts.append(make("dt", { text: name }), make("dd", { text, dir: "auto" }));
  fact("question", query.input);
  fact("time", query.time);
  fact("gold", query.gold);
  const sides = [s, other].filter(Boolean).map((own) => side(own, query));
  $("detail").replaceChildren(
    button,
    make("h2", { text: `User ${INDEX.users[s.user]}, query ${s.id}` }),
    facts,
    make("div", { class: "sides" }, ...sides),
    make("h3", { text: "All answers to this query" }),
    answers(query, s, other),
  );
  $("detail").scrollTop = 0;
}

function side(s, query) {
  const own = query.samples.find((sample) => sample.place === s.place);
  const facts = make("dl", {});
  const fact = (name, text) => text !== "" && facts.append(make("dt", { text: name }), make("dd", { text, dir: "auto" }));
  fact("answer", own.error ? "" : own.answer ?? "could not be read");
  fact("error", own.error);
  fact("gain", figure(own.gain));
  fact("probability", figure(own.probability));
  fact("votes of the most frequent answer", figure(own.agreement, 2));
  fact("seed", s.seed ? String(s.seed) : "");
  fact("fold", own.fold === null ? "" : String(own.fold));
  fact("cost", `${own.calls} calls, ${own.tokens ?? "unknown"} tokens, ${figure(own.llm_seconds, 2)} s of the LLM`);
  fact("notes", own.notes.join("\n"));
  const parts = [make("h3", { text: sideName(s) }), facts];
  if (own.details) parts.push(...detailed(own));
  else parts.push(make("p", { class: "soft", text: "The run has no details of this answer (details.jsonl)." }));
  return make("section", { "aria-label": sideName(s) }, ...parts);
}

function detailed(own) {
  const { candidates = [], records = [], messages = [], chosen, abstained, shown } = own.details;
  const parts = [];
  if (candidates.length) {
    const rows = candidates.map((c, place) => [
      place === chosen ? "picked" : "",
      [place === chosen ? (abstained ? "kept" : "✓") : "", c.answer ?? c.text, c.votes || "", c.greedy ? "yes" : "",
        figure(c.llm_probability), figure(c.score), figure(c.probability), figure(c.gain)],
    ]);
    const names = ["pick", "candidate", "votes", "greedy", "p of LLM", "score", "probability", "gain"];
    parts.push(make("h4", { text: "Candidates" }), table(names, rows, [1]));
    const raw = candidates.filter((c) => c.answer !== null && c.text !== c.answer);
    for (const c of raw) parts.push(folded(`As written: ${c.answer}`, c.text));
  }
  if (messages.length) {
    parts.push(make("h4", { text: "Prompt" }));
    for (const message of messages) {
      parts.push(make("div", { class: "soft", text: message.role }), make("div", { class: "text", text: message.content, dir: "auto" }));
    }
  } else parts.push(make("p", { class: "soft", text: "No LLM was asked." }));
  if (records.length) {
    const rows = records.map((r, place) => [
      place < shown ? "shown" : "",
      [place + 1, place < shown ? "yes" : "", r.input, r.output, figure(r.score), r.rank + 1, figure(r.usefulness), r.time],
    ]);
    const names = ["", "in prompt", "input", "answer", "retriever", "its rank", "reranker", "time"];
    parts.push(make("h4", { text: "Records" }), table(names, rows, [2, 3]));
  }
  return parts;
}

function folded(title, text) {
  return make("details", {}, make("summary", { text: title }), make("div", { class: "text", text, dir: "auto" }));
}

function table(names, rows, long) {
  // columns that hold nothing are left out
  const kept = names.map((_, column) => rows.some(([, cells]) => cells[column] !== "" && cells[column] !== null));
  const only = (cells) => cells.map((cell, column) => [cell, column]).filter(([, column]) => kept[column]);
  const head = make("tr", {}, ...only(names).map(([name]) => make("th", { scope: "col", text: name })));
  const body = rows.map(([kind, cells]) =>
    make("tr", { class: kind || null }, ...only(cells).map(([cell, column]) =>
      cell instanceof Node ? make("td", {}, cell)
        : make("td", { class: long.includes(column) ? "long" : null, dir: "auto", text: cell ?? "" }))));
  const whole = make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "table" }, whole);
}

function answers(query, ...chosen) {
  const rows = query.samples.map((own) => {
    const s = samples[own.place];
    const name = sideName(s) + (s.seed ? `, seed ${s.seed}` : "");
    const button = make("button", { type: "button", text: name });
    button.addEventListener("click", () => jump(s));
    const answer = own.error || (own.answer ?? "not readable");
    const cells = [button, mark(s), answer, figure(own.gain), figure(own.probability)];
    return [chosen.includes(s) ? "picked" : "", cells];
  });
  return table(["method", "", "answer", "gain", "probability"], rows, [2]);
}

function jump(s) {
  // to another method's sample of the same query: with the comparison, where it has this query
  const among = () => pairs.findIndex(([own]) => own === s);
  $("method").value = `${s.run}/${s.method}`;
  $("search").value = "";
  for (const id of ["outcome", "difference"]) $(id).value = "any";
  filter();
  if (among() < 0) {
    $("other").value = "";
    filter();
  }
  open(among());
}

// ---- events

const KEYS = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1 };
document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") back();
  else if (typing) {
    if (event.key === "Enter" && event.target.id === "search") { event.preventDefault(); $("list").focus(); }
    return;
  } else if (event.key === "/") $("search").focus();
  else if (event.key in KEYS && (event.key.length === 1 || event.target.id === "list")) move(current + KEYS[event.key]);
  else if (event.target.id !== "list") return;
  else if (event.key === "Enter") open(Math.max(0, current));
  else if (event.key === "Home") move(0);
  else if (event.key === "End") move(pairs.length - 1);
  else if (event.key === "PageDown") move(current + 10);
  else if (event.key === "PageUp") move(current - 10);
  else return;
  event.preventDefault();
});
let waiting = 0;
$("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
for (const id of ["method", "user", "outcome", "other", "difference"]) $(id).addEventListener("change", filter);
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("list").addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
window.addEventListener("resize", draw);
setUp();
filter();
