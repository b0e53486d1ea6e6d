// Draws the rank schedule r(t) by noise level, from noise on the left to the picture on the right.
import { html, path, setText, svg } from "./dom.js";
import { t } from "./texts.js";

const WIDTH = 1000, HEIGHT = 200;
const SAMPLES = 200;
const DOT_SECONDS = 3; // how long the last evaluation stays marked

/** r(t) at noise level 0..1, as in RankSchedule.active_rank. */
export function activeRank({ rank, min_rank, alpha, points }, level) {
  if (!points?.length) return Math.floor((rank - min_rank) * (1 - level) ** alpha) + min_rank;
  let [left, low] = points[0];
  if (level <= left) return low;
  for (const [right, high] of points.slice(1)) {
    if (level <= right) return Math.floor((low * (right - level) + high * (level - left)) / (right - left) + 1e-9);
    [left, low] = [right, high];
  }
  return low;
}

/** The points of "0:64, 0.5:48, 1:32" as [[level, rank], ...]; null if the text is not a curve, [] if it is empty. */
export function pointsOf(text) {
  const pairs = text.split(/[,;]/).filter((part) => part.trim()).map((part) => part.split(":"));
  const points = pairs.map(([level, rank]) => [Number.parseFloat(level), Number.parseInt(rank, 10)]);
  const sound = pairs.every((pair) => pair.length === 2) && points.every(([level, rank]) => level >= 0 && level <= 1 && rank >= 0);
  const rising = points.every(([level], i) => !i || level > points[i - 1][0]);
  return sound && rising && points.length !== 1 ? points : null;
}

export const textOf = (points) => points.map(([level, rank]) => `${Number(level.toFixed(2))}:${rank}`).join(", ");

/** The text key of a schedule's error, or null. */
function problem({ rank, min_rank: least, points }) {
  if (points === null) return "curve_unclear";
  if (points?.some(([, active]) => active > rank)) return "curve_above";
  return !points?.length && least > rank ? "min_rank_above" : null;
}

function summary(schedule) {
  const [least, most] = [activeRank(schedule, 1), activeRank(schedule, 0)];
  return least === most && !schedule.points?.length ? ["constant", { rank: most }] : ["ranks", { min_rank: least, rank: most }];
}

export class ScheduleChart {
  constructor() {
    this.area = svg("path", { class: "tlora-area" });
    this.line = svg("path", { class: "tlora-mean" });
    this.marks = svg("g", { class: "tlora-ticks" });
    this.high = html("span", { class: "tlora-y" });
    this.low = html("span", { class: "tlora-low" });
    this.told = html("span", { class: "tlora-value" });
    this.dot = html("span", { class: "tlora-dot" });
    this.empty = html("span", { class: "tlora-empty" });
    const grid = [0.25, 0.5, 0.75].map((f) => svg("line", { class: "tlora-grid", x1: WIDTH * f, x2: WIDTH * f, y1: 0, y2: HEIGHT }));
    this.drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
                                onpointermove: (event) => this.point(event), onpointerleave: () => this.point(null) },
                       ...grid, this.area, this.line, this.marks);
    this.element = html("div", { class: "tlora-schedule" },
                        html("div", { class: "tlora-chart" }, this.drawing, this.dot, this.high, this.low, this.told, this.empty),
                        html("div", { class: "tlora-row tlora-axis" }, html("span", {}, t("noise")), html("span", {}, t("picture"))));
    this.pointed = this.live = this.schedule = null;
  }

  /** Shows {rank, min_rank, alpha, points}, or the text `reason` if there is none. */
  show(schedule, reason = "") {
    const wrong = schedule && problem(schedule);
    this.schedule = wrong ? null : schedule;
    setText(this.empty, this.schedule ? "" : wrong ? t(wrong, schedule) : reason);
    this.element.classList.toggle("tlora-wrong", Boolean(wrong));
    if (!this.schedule) {
      for (const part of [this.area, this.line]) part.removeAttribute("d");
      for (const part of [this.high, this.low]) setText(part, "");
      this.drawing.setAttribute("aria-label", this.empty.textContent);
    } else {
      const { rank, alpha } = schedule, least = activeRank(schedule, 1);
      const points = [];
      for (let i = 0; i <= SAMPLES; i++) {
        const [x, y] = this.place(1 - i / SAMPLES, activeRank(schedule, 1 - i / SAMPLES));
        if (points.length) points.push([x, points.at(-1)[1]]); // a rank stays until the next one
        points.push([x, y]);
      }
      this.line.setAttribute("d", path(points));
      this.area.setAttribute("d", `${path(points)}L${WIDTH} ${HEIGHT}L0 ${HEIGHT}Z`);
      setText(this.high, String(rank));
      setText(this.low, least === rank ? "" : String(least));
      this.low.classList.toggle("tlora-below", least > rank / 3); // below the line if there is room
      this.low.style.bottom = `${(100 * least) / this.top}%`;
      const some = [1, 0.75, 0.5, 0.25, 0].map((level) => `${level}: ${activeRank(schedule, level)}`).join(", ");
      this.drawing.setAttribute("aria-label", schedule.points?.length ? t("curve_label", { curve: textOf(schedule.points), some })
        : t("schedule_label", { rank, min_rank: least, alpha, some }));
    }
    this.tell();
  }

  get top() {
    return this.schedule.rank * 1.15;
  }

  place(level, rank) {
    return [(1 - level) * WIDTH, HEIGHT * (1 - rank / this.top)];
  }

  /** Position of a point for an element over the drawing: left and top in percent. */
  share(level, rank) {
    const [x, y] = this.place(level, rank);
    return [`${(100 * x) / WIDTH}%`, `${(100 * y) / HEIGHT}%`];
  }

  /** Shows a sampler's position: {level, rank, steps: [[level, rank], ...]}. */
  sampling(live) {
    this.live = live;
    this.marks.replaceChildren();
    clearTimeout(this.fading);
    this.fading = setTimeout(() => this.sampled(), DOT_SECONDS * 1000);
    this.tell();
  }

  sampled() {
    if (this.live) this.live.over = true;
    this.tell();
  }

  tell() {
    const { schedule, live } = this;
    const steps = schedule && live ? live.steps : [];
    if (this.marks.childElementCount !== steps.length) {
      this.marks.replaceChildren(...steps.map(([level, rank]) => {
        const [x, y] = this.place(level, Math.min(rank, schedule.rank));
        return svg("line", { x1: x, x2: x, y1: HEIGHT, y2: y });
      }));
    }
    const told = this.pointed != null ? this.pointed : live && !live.over ? live.level : null;
    this.dot.hidden = !schedule || told == null;
    if (!schedule) return setText(this.told, "");
    if (told == null) return setText(this.told, t(...summary(schedule)));
    const rank = this.pointed == null ? live.rank : activeRank(schedule, told);
    const [left, top] = this.share(told, Math.min(rank, schedule.rank));
    Object.assign(this.dot.style, { left, top });
    this.dot.classList.toggle("tlora-live", this.pointed == null);
    setText(this.told, t("rank_at", { rank, level: told.toFixed(2) }));
  }

  point(event) {
    const box = this.drawing.getBoundingClientRect();
    this.pointed = event ? Math.min(Math.max(1 - (event.clientX - box.left) / box.width, 0), 1) : null;
    this.tell();
  }
}
