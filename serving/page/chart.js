// Lines over time on a logarithmic axis, as SVG. Elements are kept from one drawing to the next.

import { milliseconds } from "./words.js";

const GAP_S = 5; // longer without a value is a hole in the line, not a slope
const SVG = "http://www.w3.org/2000/svg";

function part(parent, tag, key) {
  let node = parent.querySelector(`:scope > [data-key="${key}"]`);
  if (!node) {
    node = document.createElementNS(SVG, tag);
    node.dataset.key = key;
    parent.append(node);
  }
  return node;
}

function put(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    const text = String(value);
    if (node.getAttribute(name) !== text) node.setAttribute(name, text);
  }
  return node;
}

/** `points`: [seconds, milliseconds | null] in order of time. */
function path(points, x, y) {
  let d = "";
  let before = -Infinity;
  for (const [t, value] of points) {
    if (value == null) {
      before = -Infinity;
      continue;
    }
    d += `${t - before > GAP_S ? "M" : "L"}${x(t).toFixed(1)} ${y(value).toFixed(1)}`;
    before = t;
  }
  return d;
}

const lastOf = (points) => (points.length ? points[points.length - 1] : null);
const FLOOR_MS = 1e-3;
const log = (ms) => Math.log10(Math.max(ms, FLOOR_MS));

function span(values, least) {
  const logs = values.filter((value) => value != null).map(log);
  if (!logs.length) return null;
  const [low, high] = [Math.min(...logs), Math.max(...logs)];
  const missing = Math.max(0, least - (high - low)) / 2;
  return [low - missing, high + missing];
}

/** One row's line, its last value a dot. */
export function spark(svg, points, from, to) {
  const [width, height] = [96, 20];
  put(svg, { viewBox: `0 0 ${width} ${height}` });
  const range = span(points.map(([, value]) => value), 0.6);
  const x = (t) => 2 + ((t - from) / (to - from)) * (width - 6);
  const y = (value) => height - 3 - ((log(value) - range[0]) / (range[1] - range[0])) * (height - 6);
  const last = range && lastOf(points);
  put(part(svg, "path", "line"), { d: range ? path(points, x, y) : "" });
  const dot = part(svg, "circle", "dot");
  put(dot, last?.[1] == null ? { r: 0 } : { r: 2, cx: x(last[0]).toFixed(1), cy: y(last[1]).toFixed(1) });
}

/** `lines`: {name, points}; `limits`: {name, ms}, drawn dashed where a line of that name is drawn. */
export function chart(svg, lines, limits, from, to) {
  const width = Math.max(svg.clientWidth, 240);
  const height = svg.clientHeight || 200;
  const [left, right, top, bottom] = [58, 10, 10, 24];
  put(svg, { viewBox: `0 0 ${width} ${height}` });

  const drawn = limits.filter((limit) => lines.some((line) => line.name === limit.name && line.points.length));
  const values = [...lines.flatMap((line) => line.points.map(([, value]) => value)), ...drawn.map((limit) => limit.ms)];
  const found = span(values, 0) ?? [-1, 2];
  const [low, high] = [Math.floor(found[0]), Math.max(Math.ceil(found[1]), Math.floor(found[0]) + 2)];
  const x = (t) => left + ((t - from) / (to - from)) * (width - left - right);
  const y = (ms) => height - bottom - ((log(ms) - low) / (high - low)) * (height - top - bottom);

  const grid = part(svg, "g", "grid");
  const wanted = new Set();
  const rule = (key, line, label) => {
    put(part(grid, "line", `l${key}`), line);
    const text = put(part(grid, "text", `t${key}`), label.at);
    if (text.textContent !== label.says) text.textContent = label.says;
    wanted.add(`l${key}`).add(`t${key}`);
  };
  const step = high - low > 4 && height < 260 ? 2 : 1;
  for (let decade = low; decade <= high; decade += step) {
    const at = y(10 ** decade).toFixed(1);
    const says = decade < 0 ? `${10 ** (decade + 3)} µs` : decade < 3 ? `${10 ** decade} ms` : `${10 ** (decade - 3)} s`;
    rule(`y${decade}`, { x1: left, x2: width - right, y1: at, y2: at }, { at: { x: left - 8, y: Number(at) + 4, "text-anchor": "end" }, says });
  }
  const minutes = (to - from) / 60;
  const every = minutes > 6 ? 2 : minutes > 2 ? 1 : 0.5;
  for (let back = 0; back <= minutes + 1e-6; back += every) {
    const at = x(to - back * 60).toFixed(1);
    const anchor = back === 0 ? "end" : back > minutes - every / 2 ? "start" : "middle";
    const says = back === 0 ? "now" : back < 1 ? `−${back * 60} s` : `−${back} min`;
    rule(`x${back}`, { x1: at, x2: at, y1: top, y2: height - bottom }, { at: { x: at, y: height - 6, "text-anchor": anchor }, says });
  }
  for (const node of [...grid.children]) if (!wanted.has(node.dataset.key)) node.remove();

  const marks = part(svg, "g", "limits");
  for (const limit of drawn) {
    const at = y(limit.ms).toFixed(1);
    put(part(marks, "line", limit.name), { x1: left, x2: width - right, y1: at, y2: at, class: `limit c-${limit.name}` });
  }
  for (const node of [...marks.children]) if (!drawn.some((limit) => limit.name === node.dataset.key)) node.remove();

  const paths = part(svg, "g", "lines");
  for (const line of lines) {
    put(part(paths, "path", line.name), { d: path(line.points, x, y), class: `line c-${line.name}` });
    const last = lastOf(line.points);
    const dot = part(paths, "circle", `${line.name}-dot`);
    put(dot, last?.[1] == null ? { r: 0 } : { r: 3.5, cx: x(last[0]).toFixed(1), cy: y(last[1]).toFixed(1), class: `dot c-${line.name}` });
  }
}

/** What a chart shows, in words. */
export function described(lines, seconds) {
  const told = lines.filter((line) => lastOf(line.points)?.[1] != null);
  if (!told.length) return "nothing yet";
  const minutes = Math.max(1, Math.round(seconds / 60));
  const parts = told.map((line) => `${line.label} ${milliseconds(lastOf(line.points)[1])}`);
  return `over the last ${minutes === 1 ? "minute" : `${minutes} minutes`}: now ${parts.join(", ")}`;
}
