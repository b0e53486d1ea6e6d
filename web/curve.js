// Edits the rank schedule: points on the chart can be dragged or moved with the arrow keys.
import { html } from "./dom.js";
import { activeRank } from "./schedule.js";
import { t } from "./texts.js";

const APART = 0.01; // minimum distance of two points in noise level
const STEP = 0.05; // noise level per arrow key

const between = (low, value, high) => Math.min(Math.max(value, low), high);

export class CurveEditor {
  /** Works on a ScheduleChart; calls `change(points)` with the new points, an empty list for none. */
  constructor(chart, change) {
    this.chart = chart;
    this.change = change;
    this.handles = [];
    this.editable = false;
    this.area = chart.drawing.parentElement;
    chart.drawing.addEventListener("dblclick", (event) => this.add(event));
  }

  /** Updates to the chart's state; `editable` if the node can change its schedule. */
  show(editable) {
    this.editable = editable;
    this.area.title = editable ? t("curve_tip") : "";
    const points = (editable && this.chart.schedule?.points) || [];
    while (this.handles.length > points.length) this.handles.pop().remove();
    while (this.handles.length < points.length) this.handles.push(this.handle(this.handles.length));
    points.forEach(([level, rank], i) => {
      const [left, top] = this.chart.share(level, rank);
      Object.assign(this.handles[i].style, { left, top });
      this.handles[i].setAttribute("aria-label", t("drag_curve", { level: level.toFixed(2), rank }));
    });
  }

  handle(i) {
    const handle = html("button", {
      class: "tlora-handle",
      onpointerdown: (event) => handle.setPointerCapture(event.pointerId),
      onpointermove: (event) => handle.hasPointerCapture(event.pointerId) && this.move(i, this.under(event)),
      onkeydown: (event) => this.key(i, event),
      ondblclick: (event) => event.stopPropagation(),
    });
    this.area.append(handle);
    return handle;
  }

  /** Noise level and rank under the pointer. */
  under(event) {
    const box = this.chart.drawing.getBoundingClientRect();
    return [1 - (event.clientX - box.left) / box.width, this.chart.top * (1 - (event.clientY - box.top) / box.height)];
  }

  move(i, [level, rank]) {
    const points = this.chart.schedule?.points.map((point) => [...point]);
    if (!points?.[i]) return;
    const [below, above] = [points[i - 1]?.[0] ?? -APART, points[i + 1]?.[0] ?? 1 + APART];
    points[i] = [between(below + APART, level, above - APART), Math.round(between(0, rank, this.chart.schedule.rank))];
    this.change(points);
  }

  key(i, event) {
    const [level, rank] = this.chart.schedule.points[i];
    const moved = { ArrowLeft: [level + STEP, rank], ArrowRight: [level - STEP, rank], ArrowUp: [level, rank + 1],
                    ArrowDown: [level, rank - 1] }[event.key];
    if (moved) this.move(i, moved);
    else if (["Delete", "Backspace"].includes(event.key)) this.remove(i);
    else return;
    event.preventDefault();
  }

  remove(i) {
    const points = this.chart.schedule.points.filter((_, j) => j !== i);
    this.change(points.length > 1 ? points : []);
  }

  /** Adds a point at a double-click; the first one turns the formula into a curve. */
  add(event) {
    const { schedule } = this.chart;
    if (!schedule || !this.editable) return;
    const [level, rank] = this.under(event);
    const ends = schedule.points?.length ? schedule.points : [[0, activeRank(schedule, 0)], [1, activeRank(schedule, 1)]];
    if (ends.some(([other]) => Math.abs(other - level) < APART)) return;
    const point = [between(0, level, 1), Math.round(between(0, rank, schedule.rank))];
    this.change([...ends, point].sort(([a], [b]) => a - b));
  }
}
