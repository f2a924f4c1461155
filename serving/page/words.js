// What the page says, from what the daemon tells: numbers in units, and the verdict. No DOM, no clock.

export const NONE = "–";

const TIERS = { ram: "RAM", nvme: "NVMe", origin: "origin", bypass: "bypass" };
const PARTS = { origin: "Origin", triton: "Triton", redis: "Redis", disk: "Disk", workers: "Workers" };

/** The sections of docs/operations.md that say what to do. */
const RUNBOOKS = {
  origin: "VoxcacheOriginFailing",
  disk: "VoxcacheDeviceFailing",
  fast: "VoxcacheSloBurnFast",
  slow: "VoxcacheSloBurnSlow",
  ageing: "VoxcacheArrivalsAgeing",
  dead: "VoxcacheArrivalsDead",
};

export const SECTIONS = { health: "Health", slos: "Objectives", warmup: "Warm-up" };

const ANSWERS = { ram: "RAM hits", nvme: "NVMe hits", origin: "misses", bypass: "bypasses" };

export const UNEXPLAINED = "unexplained";

/** Stages in the order of a walk, and whose colour they have; the last are parts of others. */
const STAGES = {
  lookup: "rest", list: "origin", identify: "triton", join: "wait", queue: "wait", reserve: "wait", nvme_read: "nvme",
  fetch: "origin", inspect: "work", decode: "work", recipe: "work", nvme_write: "nvme", admit: "rest", lease: "rest",
  turn: "wait", triton: "triton", response: "rest", handle: "rest",
  origin_first_byte: "origin", origin_body: "origin", register: "triton",
};

/** What still works, and what does not, while a part is in trouble. */
const MEANS = {
  origin: "What is held is still answered; everything else fails until it is back.",
  triton: "Tensors and leases are still answered; inferences fail.",
  redis: "Arrivals are refused; everything else goes on, and nothing that was accepted is lost.",
  disk: "RAM and the origin answer instead, more slowly.",
  workers: "Nothing new can be decoded: misses fail.",
};

/** Burn rates that are worth waking somebody, and worth a look (both windows have to say so). */
const BURNS_FAST = 14.4;
const BURNS = 6;
const AGEING_S = 900;

export const tierName = (tier) => TIERS[tier] ?? (tier && tier !== "none" ? tier : "no tier");
export const partName = (part) => PARTS[part] ?? capital(part);
export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const placed = (name, names) => (names.includes(name) ? names.indexOf(name) : names.length);

export const tierOrder = (tier) => placed(tier, Object.keys(TIERS));
export const stageOrder = (stage) => placed(stage, Object.keys(STAGES));
export const stageName = (stage) => stage.replaceAll("_", " ");
export const stageFamily = (stage) => (stage === UNEXPLAINED ? "none" : (STAGES[stage] ?? "rest"));

/** Three digits that count. */
const digits = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));

export function milliseconds(ms) {
  if (ms == null) return NONE;
  if (ms < 0.9995) return `${(ms * 1e3).toFixed(0)}\u00a0µs`;
  return ms < 999.5 ? `${digits(ms)}\u00a0ms` : `${digits(ms / 1e3)}\u00a0s`;
}

export function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  for (; n >= 1000 && unit < units.length - 1; unit += 1) n /= 1000;
  return `${unit ? n.toFixed(1) : n}\u00a0${units[unit]}`;
}

export const count = (n) => (n == null ? NONE : Math.round(n).toLocaleString("en").replaceAll(",", "\u202f"));

export function share(part) {
  if (part == null) return NONE;
  const percent = part * 100;
  const nearly = (percent > 0 && percent < 1) || (percent > 99 && percent < 100); // neither none nor all of it
  return `${nearly ? (Math.floor(percent * 10) / 10).toFixed(1) : percent.toFixed(0)}\u00a0%`;
}

/** Seconds as people say them. */
export function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  const [minutes, hours, days] = [Math.floor(s / 60) % 60, Math.floor(s / 3600) % 24, Math.floor(s / 86400)];
  if (days) return hours ? `${days} d ${hours} h` : `${days} d`;
  return minutes ? `${hours} h ${minutes} min` : `${hours} h`;
}

export const ago = (seconds) => (seconds < 2 ? "just now" : `${duration(seconds)} ago`);
export const clock = (unix) => new Date(unix * 1e3).toLocaleTimeString("en-GB");

const plural = (n, one, many) => `${count(n)} ${n === 1 ? one : many}`;

export const jobName = (job) => job.study || (job.kind === "index" ? "index of the origin" : "several studies");

export function jobProgress(job) {
  if (!job.of) return "finding out what there is to do";
  const failed = job.failures ? `, ${count(job.failures)} failed` : "";
  return `${count(job.done)} of ${count(job.of)}${failed}`;
}

/** What an objective asks for. */
export const objective = (slo) =>
  `${capital(ANSWERS[slo.tier] ?? slo.tier)}, ${(slo.target * 100).toFixed(3).replace(/\.?0+$/, "")} % below ${milliseconds(slo.threshold_ms)}`;

/** Whether enough was asked for in the last hour for one slow answer not to be a verdict. */
function judged(slo, stats) {
  const row = stats.latency.find((each) => each.of === "request" && each.name === slo.tier);
  return (row?.windows["1h"]?.n ?? 0) * (1 - slo.target) >= 1;
}

/** All that needs somebody, the worst first: `{level: "bad" | "watch", says, means, at, runbook}`;
 * `at` is the section to look in. */
export function problems(stats) {
  const found = [];
  const add = (level, at, says, means, runbook) => found.push({ level, at, says, means, runbook: RUNBOOKS[runbook] });
  for (const part of stats.health) {
    if (!part.ok) add("bad", "health", `${partName(part.what)} ${part.says}.`, MEANS[part.what] ?? "", part.what);
  }
  for (const slo of stats.slos) {
    if (!judged(slo, stats)) continue;
    const burn = Math.min(slo.burn_5m, slo.burn_1h);
    const what = ANSWERS[slo.tier] ?? slo.tier;
    const asks = `Objective ${slo.name}: ${objective(slo)}`;
    const rate = `${asks}; in the last hour ${digits(slo.burn_1h)} times as many were slower as may be.`;
    if (burn >= BURNS_FAST) add("bad", "slos", `Far too many ${what} are slow.`, rate, "fast");
    else if (burn >= BURNS) add("watch", "slos", `Too many ${what} are slow.`, rate, "slow");
    else if (slo.budget_left <= 0) add("watch", "slos", `The error budget of ${what} is spent.`, `${asks}.`, "slow");
  }
  const { dead, oldest_s: oldest } = stats.arrivals;
  if (oldest >= AGEING_S) {
    add("watch", "warmup", `An arrival has waited for ${duration(oldest)}.`, "Are there enough workers, is the origin slow?", "ageing");
  }
  if (dead) {
    add("watch", "warmup", `${plural(dead, "arrival was", "arrivals were")} given up.`, "`voxcache dead-letters` says why.", "dead");
  }
  return found.sort((a, b) => (a.level === "bad" ? 0 : 1) - (b.level === "bad" ? 0 : 1));
}

/** The first line: whether all is well and, if not, what. */
export function verdict(found) {
  if (!found.length) return { level: "well", says: "All is well." };
  const [first, ...rest] = found;
  const more = rest.length ? ` And ${rest.length === 1 ? "one thing" : `${rest.length} things`} more.` : "";
  return { level: first.level, says: first.says + more };
}

/** The last minute in a sentence or two. */
export function lastMinute(stats) {
  const rows = stats.latency.filter((row) => row.of === "request");
  const n = (tiers) => rows.filter((row) => tiers.includes(row.name)).reduce((sum, row) => sum + (row.windows["1m"]?.n ?? 0), 0);
  const answered = n(["ram", "nvme", "origin", "bypass"]);
  if (!answered) return "No tensor was asked for in the last minute.";
  const p99 = (tier, what) => {
    const minute = rows.find((row) => row.name === tier)?.windows["1m"];
    return minute?.n ? `${what} took at most ${milliseconds(minute.p99_ms)}` : "";
  };
  const times = [p99("ram", "a RAM hit"), p99("nvme", "an NVMe hit"), p99("origin", "a miss")].filter(Boolean);
  const hits = share(n(["ram", "nvme"]) / answered);
  const said = `${plural(answered, "tensor was", "tensors were")} asked for in the last minute; ${hits} were held.`;
  return times.length ? `${said} In 99 of 100 cases ${times.join(", ")}.` : said;
}
