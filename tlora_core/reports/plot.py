"""Small plots with Pillow: the loss of a training, a rank schedule with a sampler's steps, bar charts, stacks."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..method.schedule import RankSchedule
from .lettering import Lettering

_BACKGROUND, _GRID, _TEXT = (24, 26, 31), (58, 62, 72), (205, 208, 214)
_FAINT, _LINE, _MARK = (70, 110, 150), (100, 180, 255), (255, 176, 80)
_FINE = 3  # supersampling: pixels of the drawing per pixel of the picture, in each direction


class _Axes:
    """A plot area with ticks. `xy` maps data to pixels of the drawing, which is `_FINE` times as large as the
    picture."""

    def __init__(self, size: tuple[int, int], x_range, y_range, title: str, x_label: str, x_ticks, y_ticks):
        self.size = size
        self.drawing = Image.new("RGB", (size[0] * _FINE, size[1] * _FINE), _BACKGROUND)
        self.draw = ImageDraw.Draw(self.drawing)
        self.left, self.top, self.right, self.bottom = (at * _FINE for at in (64, 40, size[0] - 20, size[1] - 52))
        self.x_range, self.y_range = x_range, y_range
        letters = Lettering(14)
        self.texts = [
            (64, 10, letters.cut(title, size[0] - 64 - 8), "la"),
            ((44 + size[0]) / 2, size[1] - 12, x_label, "ms"),
        ]
        for value, text in x_ticks:
            x, _ = self.xy(value, y_range[0])
            self.draw.line([(x, self.top), (x, self.bottom)], _GRID, _FINE)
            self.texts.append((x / _FINE, self.bottom / _FINE + 5, text, "ma"))
        for value, text in y_ticks:
            _, y = self.xy(x_range[0], value)
            self.draw.line([(self.left, y), (self.right, y)], _GRID, _FINE)
            self.texts.append((self.left / _FINE - 8, y / _FINE, text, "rm"))

    def xy(self, x, y):
        fx = (x - self.x_range[0]) / ((self.x_range[1] - self.x_range[0]) or 1)
        fy = (y - self.y_range[0]) / ((self.y_range[1] - self.y_range[0]) or 1)
        return self.left + fx * (self.right - self.left), self.bottom - fy * (self.bottom - self.top)

    def line(self, points, colour, width=1):
        if len(points) > 1:
            self.draw.line([self.xy(*p) for p in points], colour, width * _FINE, joint="curve")

    def dot(self, x, y, colour, radius=4):
        (cx, cy), r = self.xy(x, y), radius * _FINE
        self.draw.ellipse([cx - r, cy - r, cx + r, cy + r], colour)

    def picture(self) -> Image.Image:
        """The picture: the drawing, reduced for smooth edges, then the text, which is sharper at full size."""
        image = self.drawing.reduce(_FINE)
        draw, letters = ImageDraw.Draw(image), Lettering(14)
        for x, y, text, anchor in self.texts:
            letters.write(draw, (x, y), text, _TEXT, anchor)
        return image


def loss_curve(losses: Sequence[float], size: tuple[int, int] = (640, 360)) -> Image.Image:
    """Loss against steps: single losses faint, their running mean (over about a twentieth of the steps) strong.

    The scale ends at the 98th percentile, as the loss of a single step can be many times that of the rest.
    """
    smooth, window = [], max(len(losses) // 20, 1)
    for i, value in enumerate(losses):
        smooth.append(value if i == 0 else smooth[-1] + (value - smooth[-1]) / min(i + 1, window))
    ordered = sorted(losses) or [1.0]
    top = max(ordered[int(0.98 * (len(ordered) - 1))], *smooth, 1e-12) * 1.05 if losses else 1.0
    last = smooth[-1] if smooth else float("nan")
    axes = _Axes(
        size,
        (1, max(len(losses), 2)),
        (0, top),
        f"loss, now {last:.4f} (running mean)",
        "step",
        [(v, str(v)) for v in _step_ticks(len(losses))],
        _round_ticks(top),
    )
    axes.line([(i + 1, min(v, top)) for i, v in enumerate(losses)], _FAINT)
    axes.line([(i + 1, min(v, top)) for i, v in enumerate(smooth)], _LINE, 3)
    return axes.picture()


def _step_ticks(count: int) -> list[int]:
    """Step 1, round numbers of steps, and the last step; round numbers too close to the last step are omitted."""
    if count < 6:
        return list(range(1, max(count, 1) + 1))
    ticks = [round(tick) for tick, _ in _round_ticks(count)][1:]
    return [1, *(tick for tick in ticks if tick < count - 0.4 * ticks[0]), count]


def schedule_curve(
    schedule: RankSchedule, steps: Sequence[tuple[float, int]] = (), size: tuple[int, int] = (640, 360)
) -> Image.Image:
    """r(t) over the noise level t/T, in a sampler's order: noise on the left, the picture on the right. steps: (t/T,
    rank) of each step of a sampler."""
    # Labels of closer ranks would touch.
    ticks = [
        rank
        for rank in {0, schedule.min_rank}
        if rank < 0.92 * schedule.rank and (not rank or rank > 0.08 * schedule.rank)
    ]
    ticks = sorted({*ticks, schedule.rank})
    shape = "a free curve" if schedule.points else f"alpha {schedule.alpha:g}"
    title = (
        f"active rank r(t): {schedule.active_rank(1, 1)} at pure noise, {schedule.active_rank(0, 1)} at the end, "
        f"{shape}"
    )
    axes = _Axes(
        size,
        (1, 0),
        (0, schedule.rank * 1.08),
        title,
        "noise level t/T",
        [(v, f"{v:g}") for v in (1, 0.75, 0.5, 0.25, 0)],
        [(v, str(v)) for v in ticks],
    )
    axes.line([(u, rank) for u, rank in schedule.curve(size[0], num_timesteps=1)], _LINE, 3)
    for u, rank in steps:
        x, y = axes.xy(u, rank)
        axes.draw.line([(x, axes.bottom), (x, y)], _FAINT, _FINE)
        axes.dot(u, rank, _MARK)
    return axes.picture()


def bar_chart(
    labels: Sequence[str],
    values: Sequence[float],
    title: str,
    x_label: str,
    spans: Sequence[tuple[float, float]] = (),
    dots: Sequence[float | None] = (),
    size: tuple[int, int] = (640, 240),
) -> Image.Image:
    """A bar for each value, with an optional thin line for its span (low, high) and an optional dot. With many labels,
    only every second, third, ... is drawn, so that they do not touch."""
    top = max([*values, *(high for _, high in spans), *(dot for dot in dots if dot is not None)]) * 1.08 or 1.0
    every = -(-30 * len(labels) // size[0])
    ticks = [(i + 0.5, label) for i, label in enumerate(labels) if i % every == 0]
    axes = _Axes(size, (0, len(labels)), (0, top), title, x_label, ticks, _round_ticks(top))
    for i, value in enumerate(values):
        axes.draw.rectangle([axes.xy(i + 0.2, value), axes.xy(i + 0.8, 0)], _LINE)
    for i, (low, high) in enumerate(spans):
        axes.line([(i + 0.5, low), (i + 0.5, high)], _TEXT, 2)
    for i, dot in enumerate(dots):
        if dot is not None:
            axes.dot(i + 0.5, dot, _MARK)
    return axes.picture()


def _round_ticks(top: float) -> list[tuple[float, str]]:
    """At most six ticks from 0 to top, at intervals of one, two or five times a power of ten."""
    power = 10.0 ** math.floor(math.log10(top) - 1)
    step = next(step for step in (power * k for k in (1, 2, 5, 10, 20)) if top / step < 6)
    return [(step * k, f"{step * k:g}") for k in range(int(top / step) + 1)]


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of equal width, one below the other."""
    whole = Image.new("RGB", (pictures[0].width, sum(p.height for p in pictures)))
    y = 0
    for picture in pictures:
        whole.paste(picture, (0, y))
        y += picture.height
    return whole
