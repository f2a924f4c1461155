// The status page: follows the daemon's statistics and fills the markup with them. Nodes are kept from one second to the
// next, so that focus, selection and a screen reader's place stay where they are.

import * as words from "./words.js";
import { chart, described, spark } from "./chart.js";

const LATE_S = 5; // the daemon tells every second
const DEAF_S = 12; // a connection that says nothing for so long is made anew
const RETRY_S = [1, 2, 5, 10];
const HISTORY_S = 600;
const LEAST_S = 60;
const SLOW_SHOWN = 5;
const RECENT_SHOWN = 12;

const $ = (selector, under = document) => under.querySelector(selector);
const still = matchMedia("(prefers-reduced-motion: reduce)");

// ------------------------------------------------------------------ filling the markup

function text(node, said) {
  if (node.textContent !== said) node.textContent = said;
}

/** Fill the slots of `node`: `{name: text}` or `{name: [text, value for machines]}`. */
function fill(node, slots) {
  for (const [name, given] of Object.entries(slots)) {
    const slot = $(`[data-slot="${name}"]`, node);
    const [said, value] = Array.isArray(given) ? given : [given, null];
    const attribute = slot.localName === "time" ? "datetime" : "value";
    text(slot, said);
    if (value != null) slot.setAttribute(attribute, value);
    else slot.removeAttribute(attribute);
  }
}

/** Make the children of `parent` those of `items`, in their order. What was there under the same key stays. */
function keyed(parent, template, items, key, update) {
  const before = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  const taken = new Set();
  let at = parent.firstElementChild;
  for (const item of items) {
    let name = key(item);
    while (taken.has(name)) name += "+"; // where UIDs are not shown, all look alike
    taken.add(name);
    const found = before.get(name);
    const node = found ?? $(template).content.firstElementChild.cloneNode(true);
    before.delete(name);
    node.dataset.key = name;
    update(node, item);
    if (node === at) at = at.nextElementSibling;
    else parent.insertBefore(node, at);
  }
  for (const node of before.values()) node.remove();
  return items.length;
}

/** Show a section's list or table if it holds something, and else its sentence on why it is empty. */
function emptyIf(section, selector, n) {
  $(selector, section).hidden = n === 0;
  $(".empty", section).hidden = n > 0;
}

const time = (unix, now) => [words.ago(now - unix), new Date(unix * 1e3).toISOString()];

// ------------------------------------------------------------------ what was told before

/** The p99 of each row and window over the last minutes. */
class History {
  #told = [];

  add(stats) {
    const last = this.#told[this.#told.length - 1];
    if (last && stats.time === last.time) return; // told twice, over the stream and beside it
    if (last && stats.time < last.time) this.#told = []; // another daemon, or its clock was set
    const rows = new Map(stats.latency.map((row) => [`${row.of}/${row.name}`, row.windows]));
    this.#told.push({ time: stats.time, rows });
    while (this.#told[0].time < stats.time - HISTORY_S) this.#told.shift();
  }

  get from() {
    return Math.min(this.#told[0].time, this.to - LEAST_S);
  }

  get to() {
    return this.#told[this.#told.length - 1].time;
  }

  points(key, window) {
    return this.#told.map(({ time: at, rows }) => {
      const told = rows.get(key)?.[window];
      return [at, told?.n ? told.p99_ms : null];
    });
  }
}

// ------------------------------------------------------------------ the sections

const history = new History();
let window_ = "1m";
let drawn = 0;
let allSlow = false;

function headline(found, stats) {
  const { level, says } = words.verdict(found);
  document.body.dataset.level = level;
  text($("#verdict"), says);
  document.title = `${level === "well" ? "✓" : "✗"} ${says} ${stats?.node ?? "voxcache"}`;
  const list = $("#problems");
  list.hidden = found.length === 0;
  keyed(list, "#t-problem", found, (each) => each.says, (node, each) => {
    node.className = each.level;
    $("strong", node).hidden = found.length === 1; // the first line says it already
    $("a", node).href = `#${each.at}`;
    $("a", node).hidden = !each.at;
    const runbook = each.runbook ? `Runbook ${each.runbook}.` : "";
    fill(node, { says: each.says, means: each.means, runbook, at: words.SECTIONS[each.at] ?? "" });
  });
}

function health(stats) {
  const section = $("#health");
  keyed($("ul", section), "#t-health", stats.health, (part) => part.what, (node, part) => {
    node.className = part.ok ? "well" : "bad";
    fill(node, { what: words.partName(part.what), says: part.says });
  });
}

function figures(stats) {
  const hits = stats.hits;
  const shown = [
    ["Hits by requests", words.share(hits.requests), hits.requests],
    ["Hits by bytes", words.share(hits.bytes), hits.bytes],
    ["Hits by cost", words.share(hits.cost), hits.cost],
    ["Waiting saved", words.duration(stats.saved_seconds), stats.saved_seconds],
    ["Fills under way", words.count(stats.fills.running), stats.fills.running],
    ["Fills that wait", words.count(stats.fills.queued), stats.fills.queued],
    ["Leases held", words.count(stats.leases), stats.leases],
  ];
  pairs($("#figures dl"), shown);
}

function pairs(list, shown) {
  keyed(list, "#t-figure", shown, ([name]) => name, (node, [name, said, value]) => {
    fill(node, { name, value: [said, value] });
  });
}

function numbers(windows) {
  const told = windows[window_];
  const of = (name) => [told?.n ? words.milliseconds(told[name]) : words.NONE, told?.n ? told[name] : null];
  return {
    n: [words.count(told?.n ?? 0), told?.n ?? 0],
    ...Object.fromEntries(["p50_ms", "p95_ms", "p99_ms", "max_ms"].map((name) => [name, of(name)])),
  };
}

function latency(stats) {
  // rows stay for an hour, so that they are found where they were, and lines in the chart have their name
  const some = stats.latency.filter((row) => Object.values(row.windows).some((window) => window.n));
  const tiers = some.filter((row) => row.of === "request");
  tiers.sort((a, b) => words.tierOrder(a.name) - words.tierOrder(b.name));
  emptyIf($("#latency"), "table", keyed($("#tier-latency tbody"), "#t-tier-latency", tiers, (row) => row.name, (node, row) => {
    node.className = `c-${row.name}`;
    fill(node, { name: words.tierName(row.name), ...numbers(row.windows) });
  }));
  const stages = some.filter((row) => row.of === "stage");
  stages.sort((a, b) => words.stageOrder(a.name) - words.stageOrder(b.name));
  emptyIf($("#stages"), "table", keyed($("#stage-latency tbody"), "#t-stage-latency", stages, (row) => row.name, (node, row) => {
    fill(node, { name: words.stageName(row.name), ...numbers(row.windows) });
  }));
  // who asked for less motion gets a drawing now and then, not one that slides all the time
  if (still.matches && stats.time - drawn < 10 && drawn <= stats.time) return;
  drawn = stats.time;
  charts(stats, tiers);
}

function charts(stats, tiers) {
  const { from, to } = history;
  const lines = tiers.map((row) => ({
    name: row.name,
    label: words.tierName(row.name),
    points: history.points(`request/${row.name}`, window_),
  })).filter((line) => line.points.some(([, value]) => value != null));
  const limits = stats.slos.map((slo) => ({ name: slo.tier, ms: slo.threshold_ms }));
  chart($("svg.chart"), lines, limits, from, to);
  text($("#chart-caption"), `p99 ${described(lines, to - from)}`);
  for (const node of document.querySelectorAll("#stage-latency tbody tr")) {
    spark($("svg", node), history.points(`stage/${node.dataset.key}`, window_), from, to);
  }
}

function slos(stats) {
  const section = $("#slos");
  emptyIf(section, "table", keyed($("tbody", section), "#t-slo", stats.slos, (slo) => slo.name, (node, slo) => {
    const left = Math.max(0, Math.min(1, slo.budget_left));
    node.className = left <= 0 ? "bad" : left < 0.25 ? "watch" : "well";
    $(".fill", node).style.inlineSize = `${left * 100}%`;
    fill(node, {
      name: slo.name,
      asks: words.objective(slo),
      budget_left: [words.share(Math.max(0, slo.budget_left)), slo.budget_left],
      burn_5m: [`${slo.burn_5m.toFixed(1)}×`, slo.burn_5m],
      burn_1h: [`${slo.burn_1h.toFixed(1)}×`, slo.burn_1h],
    });
  }));
}

function tiers(stats) {
  const section = $("#tiers");
  const most = {};
  for (const row of stats.tiers) most[row.tier] = Math.max(most[row.tier] ?? 1, row.budget_bytes);
  keyed($("tbody", section), "#t-tier", stats.tiers, (row) => `${row.tier}/${row.namespace}`, (node, row) => {
    node.className = `c-${row.tier}`;
    const budget = row.budget_bytes || 1;
    $(".bar", node).style.inlineSize = `${(row.budget_bytes / most[row.tier]) * 100}%`;
    $(".fill", node).style.inlineSize = `${Math.min(1, row.bytes / budget) * 100}%`;
    $(".reserved", node).style.insetInlineStart = `${Math.min(1, row.reserved_bytes / budget) * 100}%`;
    fill(node, {
      tier: words.tierName(row.tier),
      namespace: row.namespace,
      bytes: [words.bytes(row.bytes), row.bytes],
      budget_bytes: [words.bytes(row.budget_bytes), row.budget_bytes],
      reserved_bytes: [row.reserved_bytes ? words.bytes(row.reserved_bytes) : "nothing", row.reserved_bytes],
      entries: [words.count(row.entries), row.entries],
    });
  });
  const { utilisation, fragmentation } = stats.arena;
  text($("#arena"), `The arena is ${words.share(utilisation)} full; ${words.share(fragmentation)} of what is free is not in its largest hole.`);
}

function slow(stats) {
  const section = $("#slow");
  const all = [...stats.slow].sort((a, b) => b.ms - a.ms);
  const key = (each) => `${each.time}/${each.route}/${each.ms}`;
  emptyIf(section, "ol", keyed($("ol", section), "#t-slow", all.slice(0, allSlow ? all.length : SLOW_SHOWN), key, (node, each) => {
    fill(node, {
      ms: [words.milliseconds(each.ms), each.ms],
      tier: words.tierName(each.tier),
      route: each.route,
      status: String(each.status),
      time: [`${words.clock(each.time)}, ${words.ago(stats.time - each.time)}`, new Date(each.time * 1e3).toISOString()],
      study: each.study ?? "",
      trace: each.trace ?? "",
    });
    for (const pair of $(".ids", node).children) pair.hidden = !$("dd", pair).textContent;
    $(".tier", node).className = `tier c-${each.tier}`;
    const stages = Object.entries(each.stages).filter(([, ms]) => ms > 0); // in the order of the walk
    const told = stages.reduce((sum, [, ms]) => sum + ms, 0);
    const rest = each.ms - told;
    if (rest > each.ms * 0.005) stages.push([words.UNEXPLAINED, rest]);
    const whole = Math.max(told, each.ms);
    const most = Math.max(...stages.map(([, ms]) => ms));
    const stack = $(".stack", node);
    if (!stack.children.length) {
      for (const [stage, ms] of stages) {
        const bar = document.createElement("span");
        bar.className = `f-${words.stageFamily(stage)}`;
        bar.style.inlineSize = `${(ms / whole) * 100}%`;
        stack.append(bar);
      }
    }
    keyed($(".parts", node), "#t-part", stages, ([stage]) => stage, (item, [stage, ms]) => {
      item.className = ms === most ? "most" : "";
      $(".mark", item).className = `mark f-${words.stageFamily(stage)}`;
      fill(item, { stage: words.stageName(stage), ms: [words.milliseconds(ms), ms] });
    });
  }));
  $("#slow-all").hidden = all.length <= SLOW_SHOWN;
  text($("#slow-all"), allSlow ? `Show ${SLOW_SHOWN} only` : `Show all ${all.length}`);
}

function warmup(stats) {
  const section = $("#warmup");
  const { new: waiting, assigned, done, dead, oldest_s: oldest } = stats.arrivals;
  pairs($("dl", section), [
    ["Arrivals that wait", words.count(waiting), waiting],
    ["In work", words.count(assigned), assigned],
    ["Done", words.count(done), done],
    ["Given up", words.count(dead), dead],
    ["Oldest waits", waiting + assigned ? words.duration(oldest) : words.NONE, oldest],
  ]);
  emptyIf(section, "ul", keyed($("ul", section), "#t-warming", stats.warming, (each) => each.job, (node, each) => {
    const bar = $("progress", node);
    bar.max = Math.max(each.of, 1);
    bar.value = each.done;
    bar.setAttribute("aria-label", `${words.jobName(each)}, part that is done`);
    $(".name", node).classList.toggle("uid", each.study !== "");
    fill(node, { name: words.jobName(each), said: words.jobProgress(each) });
  }));
}

function recent(stats) {
  const section = $("#recent");
  const shown = stats.recent.slice(0, RECENT_SHOWN);
  emptyIf(section, "table", keyed($("tbody", section), "#t-recent", shown, (each) => `${each.study}/${each.series}/${each.tier}`, (node, each) => {
    $(".tier", node).className = `tier c-${each.tier}`;
    fill(node, {
      study: each.study || "not shown",
      series: each.series || "not shown",
      tier: each.tier ? words.tierName(each.tier) : "gone",
      bytes: [words.bytes(each.bytes), each.bytes],
      last_use: time(each.last_use, stats.time),
    });
  }));
}

function show(stats) {
  $("main").hidden = false;
  text($("#lede"), words.lastMinute(stats));
  text($("#of"), words.clock(stats.time));
  $("#of").setAttribute("datetime", new Date(stats.time * 1e3).toISOString());
  text($("#identity"), `voxcache ${stats.version} on ${stats.node}, up ${words.duration(stats.uptime_s)}`);
  for (const section of [health, figures, latency, slos, tiers, slow, warmup, recent]) section(stats);
}

// ------------------------------------------------------------------ news, and their absence

let stats = null;
let heard = null; // when the last news came, by this machine's clock that only goes forward
let silence = ""; // why there are none
let source = null;
let opened = 0;
let tries = 0;
let paused = false;

const now = () => performance.now() / 1e3;

function take(told) {
  stats = told;
  heard = now();
  tries = 0;
  silence = "";
  history.add(told);
  if (!paused) show(told);
  tell();
}

/** The first line, and how fresh all below it is. */
function tell() {
  const age = heard == null ? now() : now() - heard;
  const late = age > LATE_S || silence !== "";
  document.body.classList.toggle("stale", late && heard != null);
  if (late && (heard != null || silence !== "" || age > LATE_S)) {
    const since = heard == null ? "" : `What is below is from ${words.clock(stats.time)}. `;
    const means = `${since}${silence || "The page goes on trying."}`;
    headline([{ level: "bad", at: "", says: heard == null ? "The daemon does not answer." : `No news since ${words.clock(stats.time)}.`, means }], stats);
  } else if (stats) {
    headline(words.problems(stats), stats);
  }
  const fresh = heard == null ? "no news yet" : late ? `${words.duration(age)} old, of ` : "live, ";
  text($("#fresh"), paused ? "paused, as of " : fresh);
}

function open() {
  source?.close();
  opened = now();
  source = new EventSource("v1/stats/events");
  const news = (event) => take(JSON.parse(event.data));
  source.addEventListener("message", news);
  source.addEventListener("stats", news);
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED) again();
  });
}

/** The stream was refused or is deaf: ask once without it, which brings the news or says why there are none. */
async function again() {
  source?.close();
  source = null;
  const wait = RETRY_S[Math.min(tries, RETRY_S.length - 1)];
  tries += 1;
  try {
    const answer = await fetch("v1/stats", { cache: "no-store", signal: AbortSignal.timeout(DEAF_S * 1e3) });
    if (answer.ok) take(await answer.json());
    else silence = answer.status === 401 || answer.status === 403 ? "It wants to know who asks: sign in again." : `It answered ${answer.status}.`;
  } catch {
    silence = "It cannot be reached from here; the page goes on trying.";
  }
  tell();
  setTimeout(open, wait * 1e3);
}

function watch() {
  if (source && now() - Math.max(heard ?? 0, opened) > DEAF_S) again();
  tell();
}

// ------------------------------------------------------------------ what can be pressed

$("#windows").addEventListener("change", (event) => {
  window_ = event.target.value;
  drawn = 0;
  if (stats) latency(stats);
});

$("#slow-all").addEventListener("click", () => {
  allSlow = !allSlow;
  $("#slow-all").setAttribute("aria-expanded", String(allSlow));
  if (stats) slow(stats);
});

$("#pause").addEventListener("click", () => {
  paused = !paused;
  $("#pause").setAttribute("aria-pressed", String(paused));
  if (stats && !paused) show(stats);
  tell();
});

document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") watch();
});

new ResizeObserver(() => {
  drawn = 0;
  if (stats && !paused) latency(stats);
}).observe($("svg.chart"));

open();
setInterval(watch, 1000);
