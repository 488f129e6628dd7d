"""The report's pictures, as SVG in the page."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Sequence

from pretrain.data.selection.rules import BINS, Rule, Scale, number

WIDTH, HEIGHT, FOOT, EDGE = 320, 120, 18, 4
SHOWN = "\n\t\u200c\u200d"  # joiners stand within words of some scripts
KEPT, DROPPED, QUIET = "#3b7dd8", "#d2452d", "#5b636b"


def escaped(text: str) -> str:
    """For HTML: signs that no page may hold, or that turn the text around, become visible."""
    return html.escape("".join(sign if _is_shown(sign) else "\ufffd" for sign in text))


def _is_shown(sign: str) -> bool:
    return sign.isprintable() or sign in SHOWN or unicodedata.category(sign) == "Zs"


def histogram(rule: Rule, counts: Sequence[int]) -> str:
    """BINS counts of what a rule measured; its thresholds are lines."""
    scale = rule.scale
    assert scale is not None
    largest, width = max(*counts, 1), (WIDTH - 2 * EDGE) / BINS
    parts = []
    for place, count in enumerate(counts):
        if count:
            tall = max(math.sqrt(count / largest) * (HEIGHT - FOOT - EDGE), 1.0)
            colour = DROPPED if _outside(rule, scale.value((place + 0.5) / BINS)) else KEPT
            parts.append(_box(EDGE + place * width, HEIGHT - FOOT - tall, width * 0.9, tall, colour, f"{count:,}"))
    parts += [_threshold(scale, bound) for bound in (rule.least, rule.most) if bound is not None]
    return _svg(rule.name, [*parts, _line(EDGE, HEIGHT - FOOT, WIDTH - EDGE, HEIGHT - FOOT, QUIET), *_axis(scale)])


def _outside(rule: Rule, value: float) -> bool:
    return (rule.least is not None and value < rule.least) or (rule.most is not None and value > rule.most)


def _threshold(scale: Scale, bound: float) -> str:
    across = _across(scale, bound)
    side, shift = ("end", -3) if across > WIDTH / 2 else ("start", 3)
    return _line(across, 0, across, HEIGHT - FOOT, DROPPED) + _text(across + shift, 10, number(bound), side, DROPPED)


def _axis(scale: Scale) -> list[str]:
    ticks = [scale.low, (scale.low + scale.high) / 2, scale.high]
    if scale.log:
        decades = round(math.log10(scale.high / scale.low))
        ticks = [scale.low * 10**power for power in range(0, decades + 1, 1 if decades < 4 else 2)]
    sides = {scale.low: "start", scale.high: "end"}
    return [_text(_across(scale, tick), HEIGHT - 4, number(tick), sides.get(tick, "middle"), QUIET) for tick in ticks]


def _across(scale: Scale, value: float) -> float:
    return EDGE + float(scale.places(value)) * (WIDTH - 2 * EDGE)


def bars(counts: Sequence[tuple[str, int]]) -> str:
    """Named counts, one bar each, by the square root."""
    largest, width = max(count for _, count in counts) or 1, min((WIDTH - 2 * EDGE) / len(counts), 56)
    parts = []
    for place, (name, count) in enumerate(counts):
        tall = math.sqrt(count / largest) * (HEIGHT - FOOT - 16)
        middle = EDGE + (place + 0.5) * width
        parts.append(_box(middle - 0.4 * width, HEIGHT - FOOT - tall, 0.8 * width, tall, KEPT, f"{count:,}"))
        parts.append(_text(middle, HEIGHT - FOOT - tall - 3, f"{count:,}", "middle", QUIET))
        parts.append(_text(middle, HEIGHT - 4, name, "middle", QUIET))
    return _svg("counts", [*parts, _line(EDGE, HEIGHT - FOOT, WIDTH - EDGE, HEIGHT - FOOT, QUIET)])


def _svg(name: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(name)}">'
    return f"{head}{''.join(parts)}</svg>"


def _box(x: float, y: float, width: float, height: float, colour: str, told: str) -> str:
    size = f'width="{width:.2f}" height="{height:.2f}"'
    return f'<rect x="{x:.2f}" y="{y:.2f}" {size} fill="{colour}"><title>{escaped(told)}</title></rect>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, side: str, colour: str) -> str:
    place = f'x="{x:.2f}" y="{y:.2f}" text-anchor="{side}"'
    return f'<text {place} font-size="10" fill="{colour}">{escaped(text)}</text>'
