"""Plots as SVG text, to stand in a page by themselves: lines and stacked bars, with axes that can be read."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

#: Colours that differ for colour-blind readers, on light and dark ground (Okabe and Ito).
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b8a800")
_WIDTH: Final = 720
_LEFT: Final = 64
_RIGHT: Final = 16

Points = Sequence[tuple[float, float]]


def lines(
    title: str,
    series: Mapping[str, Points],
    *,
    x: str,
    y: str,
    log: bool = True,
    ticks: Sequence[tuple[float, str]] | None = None,
    height: int = 260,
) -> str:
    """A line for each series. ``log``: the y axis is by powers of ten. ``ticks``: of the x axis, if they are given."""
    kept = {
        name: [p for p in points if math.isfinite(p[1]) and (p[1] > 0 or not log)] for name, points in series.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    xs = [at for points in kept.values() for at, _ in points]
    ys = [value for points in kept.values() for _, value in points]
    low_x, high_x = min(xs), max(*xs, min(xs) + 1e-9)
    low, high = (
        (10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys) * 1.0001)))
        if log
        else (0.0, max(ys) * 1.05 or 1.0)
    )
    legend = 18 * ((len(kept) + 3) // 4)
    top, bottom = 34 + legend, height + legend
    right = _WIDTH - _RIGHT

    def px(at: float) -> float:
        return _LEFT + (right - _LEFT) * (at - low_x) / (high_x - low_x)

    def py(value: float) -> float:
        share = (math.log10(value / low) / math.log10(high / low)) if log else (value - low) / (high - low)
        return bottom - (bottom - top) * share

    out = _start(title, bottom + 40)
    for value in _decades(low, high) if log else _steps(low, high):
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{py(value):.1f}" y2="{py(value):.1f}"/>')
        out.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{py(value) + 4:.1f}" text-anchor="end">{_short(value)}</text>'
        )
    for at, text in ticks or [(at, _short(at)) for at in _steps(low_x, high_x)]:
        if low_x <= at <= high_x:
            out.append(
                f'<text class="tick" x="{px(at):.1f}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>'
            )
    out.append(
        f'<text class="tick" x="{(_LEFT + right) / 2}" y="{bottom + 33}" text-anchor="middle">{escape(x)}</text>'
    )
    out.append(
        f'<text class="tick" transform="translate(14 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y)}</text>"
    )
    for number, (name, points) in enumerate(kept.items()):
        colour = COLOURS[number % len(COLOURS)]
        dash = f' stroke-dasharray="{2 + 3 * (number // len(COLOURS))} 3"' if number >= len(COLOURS) else ""
        path = " ".join(f"{px(at):.1f},{py(value):.1f}" for at, value in points)
        if len(points) == 1:
            at, value = points[0]
            out.append(f'<circle cx="{px(at):.1f}" cy="{py(value):.1f}" r="3" fill="{colour}"/>')
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8"{dash} points="{path}"/>')
        column, row = number % 4, number // 4
        at_x, at_y = _LEFT + column * (right - _LEFT) / 4, 36 + 18 * row
        out.append(f'<rect x="{at_x}" y="{at_y - 9}" width="14" height="3" fill="{colour}"/>')
        out.append(f'<text class="tick" x="{at_x + 18}" y="{at_y - 4}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>"])


def stacked(title: str, rows: Mapping[str, Mapping[str, float]], *, unit: str, relative: bool = False) -> str:
    """A bar for each row, of parts one after another; ``relative``: each row is as long as the others."""
    rows = {name: parts for name, parts in rows.items() if sum(parts.values()) > 0}
    if not rows:
        return ""
    names = list(dict.fromkeys(part for parts in rows.values() for part in parts))
    left, right = 190, _WIDTH - 90
    most = max(sum(parts.values()) for parts in rows.values())
    legend = 18 * ((len(names) + 4) // 5)
    top = 34 + legend
    out = _start(title, top + 24 * len(rows) + 12)
    for number, name in enumerate(names):
        at_x, at_y = 12 + (number % 5) * 138, 36 + 18 * (number // 5)
        out.append(f'<rect x="{at_x}" y="{at_y - 10}" width="10" height="10" fill="{COLOURS[number % len(COLOURS)]}"/>')
        out.append(f'<text class="tick" x="{at_x + 15}" y="{at_y - 1}">{escape(name)}</text>')
    for row, (name, parts) in enumerate(rows.items()):
        total = sum(parts.values())
        y = top + 24 * row
        out.append(f'<text class="tick" x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        at = float(left)
        for number, part in enumerate(names):
            width = (right - left) * parts.get(part, 0.0) / (total if relative else most)
            if width > 0:
                share, colour = f"{parts[part] / total:.1%}", COLOURS[number % len(COLOURS)]
                out.append(
                    f'<rect x="{at:.1f}" y="{y}" width="{width:.1f}" height="18" fill="{colour}">'
                    f"<title>{escape(part)}: {_short(parts[part])} {escape(unit)}, {share}</title></rect>"
                )
            at += width
        out.append(f'<text class="tick" x="{at + 6:.1f}" y="{y + 13}">{_short(total)} {escape(unit)}</text>')
    return "\n".join([*out, "</svg>"])


def bars(title: str, values: Mapping[str, float], *, unit: str, log: bool = True, ours: str = "") -> str:
    """A bar for each value, by powers of ten where ``log``; the ones whose name begins with ``ours`` stand out."""
    values = {name: value for name, value in values.items() if value > 0}
    if not values:
        return ""
    left, right = 260, _WIDTH - 100
    low = 10 ** math.floor(math.log10(min(values.values()))) if log else 0.0
    high = max(values.values())
    out = _start(title, 34 + 24 * len(values) + 12)
    for row, (name, value) in enumerate(values.items()):
        share = (math.log10(value / low) / math.log10(max(high / low, 1.0001))) if log else value / high
        y, width = 34 + 24 * row, max((right - left) * share, 2.0)
        colour = COLOURS[0] if ours and name.startswith(ours) else COLOURS[6]
        out.append(f'<text class="tick" x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        out.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="18" fill="{colour}"/>')
        out.append(f'<text class="tick" x="{left + width + 6:.1f}" y="{y + 13}">{_short(value)} {escape(unit)}</text>')
    return "\n".join([*out, "</svg>"])


def _start(title: str, height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" role="img" '
        f'aria-label="{escape(title, quote=True)}" font-family="system-ui, sans-serif" font-size="12">',
        "<style>.ground{fill:#fff}.title{fill:#111;font-weight:600;font-size:14px}.tick{fill:#444}.grid{stroke:#ddd}"
        "@media (prefers-color-scheme: dark){.ground{fill:#16181c}.title{fill:#eee}.tick{fill:#bbb}.grid{stroke:#333}}"
        "</style>",
        '<rect class="ground" width="100%" height="100%"/>',
        f'<text class="title" x="12" y="18">{escape(title)}</text>',
    ]


def _decades(low: float, high: float) -> list[float]:
    first, last = round(math.log10(low)), round(math.log10(high))
    return [10.0**power for power in range(first, last + 1)]


def _steps(low: float, high: float) -> list[float]:
    """Some five round numbers from ``low`` to ``high``."""
    rough = (high - low) / 5
    if rough <= 0:
        return [low]
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [step * number for number in range(first, math.floor(high / step) + 1)]


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
