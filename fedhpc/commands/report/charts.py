"""Charts as inline SVG. Text and colours are the page's (page.css): classes c0 ... for series, `ink` for axes.

A series is told by colour, dash and marker together, so that it can be told without colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from xml.etree.ElementTree import Element, tostring

import numpy as np
from markupsafe import Markup

from fedhpc.commands.report.mix import ClassMix
from fedhpc.commands.report.runs import Floats, Layers

COLOURS = 7
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "M-3.5-3.5h7v7h-7z",
    "M0-5L4.5 3.5h-9z",
    "M0-5L5 0L0 5L-5 0z",
    "M0 5L4.5-3.5h-9z",
)
WIDTH, HEIGHT = 420, 290
LEFT, RIGHT, TOP, BOTTOM = 48, 400, 10, 246
MOST_MARKERS = 12
"""No line has more markers."""
SPREAD = 20
"""Where one line ends so many times further right than another, the axis is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart, with the band between its lowest and highest run."""

    index: int
    """Number of its colour, dash and marker."""
    name: str
    x: Floats
    y: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, kw_only=True)
class ChartAxis:
    """Numbers along an axis, divided by its unit."""

    title: str
    unit: float = 1.0


def line_chart(title: str, series: Sequence[Series], x: ChartAxis) -> Markup:
    """Lines over a common grid, with a tooltip at each marker."""
    chart = _svg(title, WIDTH, HEIGHT, class_="chart")
    ends = [float(line.x.max()) / x.unit for line in series]
    logarithmic = max(ends) > SPREAD * min(ends) > 0
    first = min(float(line.x[line.x > 0].min(initial=math.inf)) for line in series) / x.unit
    plot = _Plot(
        x=replace(x, title=f"{x.title}, logarithmic") if logarithmic else x,
        x_ticks=decades(first, max(ends)) if logarithmic else ticks(0.0, max(ends)),
        logarithmic=logarithmic,
        y_ticks=ticks(min(float(line.low.min()) for line in series), max(float(line.high.max()) for line in series)),
    )
    plot.draw_axes(chart)
    for line in series:
        plot.draw(line, _add(chart, "g", class_=f"c{line.index % COLOURS} s{line.index}"))
    return _markup(chart)


@dataclass(frozen=True, kw_only=True)
class _Plot:
    """Where numbers are in a line chart."""

    x: ChartAxis
    x_ticks: list[float]
    y_ticks: list[float]
    logarithmic: bool
    """Whether the x axis is."""

    def across(self, value: float) -> float:
        first, *_, last = self.x_ticks
        at = max(value / self.x.unit, first)
        if self.logarithmic:
            first, last, at = math.log10(first), math.log10(last), math.log10(at)
        return LEFT + (at - first) / (last - first) * (RIGHT - LEFT)

    def up(self, value: float) -> float:
        first, *_, last = self.y_ticks
        return BOTTOM - (value - first) / (last - first) * (BOTTOM - TOP)

    def points(self, x: Floats, y: Floats) -> list[tuple[float, float]]:
        return [(self.across(a), self.up(b)) for a, b in zip(x, y, strict=True)]

    def draw_axes(self, chart: Element) -> None:
        for tick in self.y_ticks:
            at = self.up(tick)
            _add(chart, "path", class_="grid", d=_path([(LEFT, at), (RIGHT, at)]))
            _text(chart, _tick(tick, self.y_ticks), LEFT - 6, at + 4, class_="end")
        for tick in self.x_ticks:
            words = f"{tick:g}" if self.logarithmic else _tick(tick, self.x_ticks)
            _text(chart, words, self.across(tick * self.x.unit), BOTTOM + 18, class_="middle")
        _add(chart, "path", class_="axis", d=_path([(LEFT, BOTTOM), (RIGHT, BOTTOM)]))
        _text(chart, self.x.title, (LEFT + RIGHT) / 2, HEIGHT - 6, class_="middle")

    def draw(self, line: Series, group: Element) -> None:
        if not np.array_equal(line.low, line.high):
            outline = [*self.points(line.x, line.high), *reversed(self.points(line.x, line.low))]
            _add(group, "path", class_="band", d=_path(outline) + "z")
        points = self.points(line.x, line.y)
        drawn = _add(group, "path", class_="line", d=_path(points), stroke_dasharray=_dash(line.index))
        _add(drawn, "title").text = line.name
        every = -(-len(points) // MOST_MARKERS)
        for place in range(len(points) - 1, -1, -every):
            _add(_marker(group, line.index, *points[place]), "title").text = self.words(line, place)

    def words(self, line: Series, place: int) -> str:
        x, y, low, high = (_plain(values[place]) for values in (line.x / self.x.unit, line.y, line.low, line.high))
        return f"{line.name}: {y}{f' ({low} to {high})' if low != high else ''}; {self.x.title}: {x}"


def key(index: int) -> Markup:
    """A sample of a series, for the legend."""
    sample = Element("svg", {"class": f"key c{index % COLOURS}", "viewBox": "0 0 40 14", "aria-hidden": "true"})
    _add(sample, "path", class_="line", d="M1 7H39", stroke_dasharray=_dash(index))
    _marker(sample, index, 20, 7)
    return _markup(sample)


def stacked_bar(title: str, parts: Sequence[tuple[str, float]], whole: float) -> Markup:
    """One bar of parts side by side, as long as its share of the whole; part i has colour i."""
    chart = _svg(title, 1000, 20, class_="bar")
    start = 0.0
    for index, (name, size) in enumerate(parts):
        width = 1000 * max(size, 0.0) / whole if whole else 0.0
        part = _add(chart, "rect", class_=f"c{index % COLOURS} f", x=_number(start), width=_number(width), height="20")
        _add(part, "title").text = name
        start += width
    return _markup(chart)


def box_bar(title: str, values: Floats, index: int) -> Markup:
    """Where values between 0 and 1 lie: all of them thin, the middle half thick, the median marked."""
    low, first, median, third, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)) * 1000
    chart = _svg(title, 1000, 20, class_=f"bar c{index % COLOURS}")
    _add(chart, "rect", class_="track", width="1000", height="20")
    _add(chart, "rect", class_="f", x=_number(low), y="8", width=_number(high - low), height="4")
    _add(chart, "rect", class_="f", x=_number(first), y="3", width=_number(max(third - first, 2)), height="14")
    _add(chart, "rect", class_="median", x=_number(min(max(median - 3, 0), 994)), y="0", width="6", height="20")
    return _markup(chart)


def layer_bar(title: str, layers: Layers) -> Markup:
    """A cell for each layer, stronger for a higher score, underlined where it is exchanged."""
    chart = _svg(title, layers.count, 10, class_="bar c0")
    scores = np.ones(layers.count) if layers.scores is None else layers.scores
    low, span = scores.min(initial=math.inf), np.ptp(scores) if scores.size else 0.0
    for layer, score in enumerate(scores):
        shade = 0.15 + 0.85 * (score - low) / span if span else 0.15
        is_exchanged = layer in layers.exchanged
        cell = _add(chart, "rect", class_="f", x=f"{layer + 0.02}", width="0.96", height="7", opacity=f"{shade:.2f}")
        words = f"layer {layer}" + ("" if layers.scores is None else f": score {score:.4g}")
        _add(cell, "title").text = words + (", exchanged" if is_exchanged else "")
        if is_exchanged:
            _add(chart, "rect", class_="mark", x=f"{layer + 0.02}", y="8", width="0.96", height="2")
    return _markup(chart)


def class_bars(title: str, mix: ClassMix) -> Markup:
    """A thin bar for each device, as high as it has examples, in parts by class."""
    most = int(mix.counts.sum(axis=1).max())
    chart = _svg(title, len(mix.counts), 100, class_="devices")
    for place, (device, row) in enumerate(zip(mix.device_ids, mix.counts, strict=True)):
        bar, top = _add(chart, "g"), 100.0
        parts = [f"{mix.class_names[label]} {row[label]}" for label in np.flatnonzero(row)]
        _add(bar, "title").text = f"device {device}: {', '.join(parts)}"
        for label in np.flatnonzero(row):
            height = 100 * row[label] / most
            top -= height
            box = {"x": f"{place + 0.05}", "y": _number(top), "width": "0.9", "height": _number(height)}
            _add(bar, "rect", class_=f"c{label % COLOURS} f", **box)
    return _markup(chart)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers about evenly from at most the lowest to at least the highest, four to seven of them."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.99)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from at most the lowest to at least the highest, which is larger."""
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    step = min(after - before for before, after in pairwise(ticks))
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" if abs(value) < 1e6 else f"{value:g}"


def _plain(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def _svg(title: str, width: float, height: float, class_: str) -> Element:
    # Charts without text fill whatever width they get.
    stretch = {} if class_ == "chart" else {"preserveAspectRatio": "none"}
    attributes = {"class": class_, "viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": title}
    return Element("svg", attributes | stretch)


def _add(parent: Element, tag: str, **attributes: str) -> Element:
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value}
    child = Element(tag, named)
    parent.append(child)
    return child


def _text(parent: Element, text: str, x: float, y: float, class_: str) -> None:
    _add(parent, "text", class_=class_, x=_number(x), y=_number(y)).text = text


def _marker(parent: Element, index: int, x: float, y: float) -> Element:
    shape = MARKERS[index % len(MARKERS)]
    return _add(parent, "path", class_="marker", d=shape, transform=f"translate({_number(x)} {_number(y)})")


def _dash(index: int) -> str:
    return DASHES[index % len(DASHES)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _markup(chart: Element) -> Markup:
    return Markup(tostring(chart, encoding="unicode"))
