"""Two small pictures, drawn with Pillow: the loss of a training, and a rank schedule with a sampler's steps on it."""
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .schedule import RankSchedule

_BACKGROUND, _GRID, _TEXT = (24, 26, 31), (58, 62, 72), (205, 208, 214)
_FAINT, _LINE, _MARK = (70, 110, 150), (100, 180, 255), (255, 176, 80)


class _Axes:
    """A plot area with ticks; `xy` maps data to pixels."""

    def __init__(self, size: tuple[int, int], x_range, y_range, title: str, x_label: str, x_ticks, y_ticks):
        self.image = Image.new("RGB", size, _BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(14)
        self.left, self.top, self.right, self.bottom = 64, 40, size[0] - 20, size[1] - 52
        self.x_range, self.y_range = x_range, y_range
        self.draw.text((self.left, 12), title, _TEXT, font=self.font)
        self.draw.text(((self.left + self.right) / 2, size[1] - 12), x_label, _TEXT, font=self.font, anchor="ms")
        for value, text in x_ticks:
            x, _ = self.xy(value, y_range[0])
            self.draw.line([(x, self.top), (x, self.bottom)], _GRID)
            self.draw.text((x, self.bottom + 6), text, _TEXT, font=self.font, anchor="mt")
        for value, text in y_ticks:
            _, y = self.xy(x_range[0], value)
            self.draw.line([(self.left, y), (self.right, y)], _GRID)
            self.draw.text((self.left - 8, y), text, _TEXT, font=self.font, anchor="rm")

    def xy(self, x, y):
        fx = (x - self.x_range[0]) / ((self.x_range[1] - self.x_range[0]) or 1)
        fy = (y - self.y_range[0]) / ((self.y_range[1] - self.y_range[0]) or 1)
        return self.left + fx * (self.right - self.left), self.bottom - fy * (self.bottom - self.top)

    def line(self, points, colour, width=1):
        if len(points) > 1:
            self.draw.line([self.xy(*p) for p in points], colour, width, joint="curve")

    def dot(self, x, y, colour, radius=4):
        cx, cy = self.xy(x, y)
        self.draw.ellipse([cx - radius, cy - radius, cx + radius, cy + radius], colour)


def loss_curve(losses: Sequence[float], size: tuple[int, int] = (640, 360)) -> Image.Image:
    """Loss against steps: each step's faint, the running mean (over about a twentieth of the steps) strong.

    The scale ends at the 98th percentile, as one step at a quiet timestep can be many times the rest.
    """
    smooth, window = [], max(len(losses) // 20, 1)
    for i, value in enumerate(losses):
        smooth.append(value if i == 0 else smooth[-1] + (value - smooth[-1]) / min(i + 1, window))
    ordered = sorted(losses) or [1.0]
    top = max(ordered[int(0.98 * (len(ordered) - 1))], *smooth, 1e-12) * 1.05 if losses else 1.0
    last = smooth[-1] if smooth else float("nan")
    axes = _Axes(size, (1, max(len(losses), 2)), (0, top), f"loss, now {last:.4f} (running mean)", "step",
                 [(v, str(v)) for v in _round_steps(len(losses))], [(top * k / 4, f"{top * k / 4:.3g}") for k in range(5)])
    axes.line([(i + 1, min(v, top)) for i, v in enumerate(losses)], _FAINT)
    axes.line([(i + 1, min(v, top)) for i, v in enumerate(smooth)], _LINE, 3)
    return axes.image


def _round_steps(count: int) -> list[int]:
    """1, the last step, and a few in between."""
    return sorted({1, *(round(count * k / 4) for k in range(1, 5))} - {0}) if count else [1]


def schedule_curve(schedule: RankSchedule, steps: Sequence[tuple[float, int]] = (),
                   size: tuple[int, int] = (640, 360)) -> Image.Image:
    """r(t) over the noise level t/T, from noise on the left to the picture on the right as a sampler goes; `steps`
    holds (t/T, rank) of each step of a sampler."""
    ticks = sorted({0, schedule.min_rank, schedule.rank})
    title = f"active rank r(t): {schedule.min_rank} at pure noise, {schedule.rank} at the end, alpha {schedule.alpha:g}"
    axes = _Axes(size, (1, 0), (0, schedule.rank * 1.08), title, "noise level t/T",
                 [(v, f"{v:g}") for v in (1, 0.75, 0.5, 0.25, 0)], [(v, str(v)) for v in ticks])
    axes.line([(u, rank) for u, rank in schedule.curve(size[0], num_timesteps=1)], _LINE, 3)
    for u, rank in steps:
        x, y = axes.xy(u, rank)
        axes.draw.line([(x, axes.bottom), (x, y)], _FAINT)
        axes.dot(u, rank, _MARK)
    return axes.image
