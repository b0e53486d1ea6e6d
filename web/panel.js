// The training panel of the Train node: loss, scores, speed, time left, memory, validation pictures, and the two buttons.
import { addPanel, html, path, setText, svg } from "./dom.js";
import { drawsElements, keepShort, toggleAdvanced } from "./fold.js";
import { followNode } from "./graph.js";
import { picturesOf } from "./pictures.js";
import { planOf } from "./plan.js";
import { ask, mark, runOf } from "./runs.js";
import { ScoresChart } from "./scores.js";
import { Strip } from "./strip.js";
import { t } from "./texts.js";

const WIDTH = 1000, HEIGHT = 300; // the chart's coordinates, stretched to the element
const HEIGHT_IDLE = 125, HEIGHT_RUN = 128, HEIGHT_STRIP = 96, HEIGHT_LINE = 16, HEIGHT_GAP = 6; // pixels
const MOST_LINES = 6, CHARACTERS = 46; // of a message, beyond which it scrolls; of a line on a node of usual width

export function duration(seconds) {
  const whole = Math.round(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

const memory = (megabytes) => (megabytes >= 1024 ? `${(megabytes / 1024).toFixed(1)} GB` : `${Math.round(megabytes)} MB`);

const short = (value) => (value === 0 ? "0" : Number(value.toPrecision(3)).toString());

/** The loss of each step (faint) and its running mean (strong), over all steps of the run. */
class LossChart {
  constructor() {
    this.raw = svg("path", { class: "tlora-raw" });
    this.mean = svg("path", { class: "tlora-mean" });
    this.top = html("span", { class: "tlora-y" });
    this.last = html("span", { class: "tlora-x" });
    this.value = html("span", { class: "tlora-value" });
    this.cursor = svg("line", { class: "tlora-cursor", y1: 0, y2: HEIGHT });
    this.empty = html("span", { class: "tlora-empty" }, t("idle"));
    const grid = [0.25, 0.5, 0.75].map((f) => svg("line", { class: "tlora-grid", x1: 0, x2: WIDTH, y1: HEIGHT * f, y2: HEIGHT * f }));
    this.drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
                                onpointermove: (event) => this.point(event), onpointerleave: () => this.unpoint() },
                       ...grid, this.raw, this.mean, this.cursor);
    this.element = html("div", { class: "tlora-chart" }, this.drawing, this.top, html("span", { class: "tlora-y0" }, "0"),
                        this.last, this.value, this.empty);
    this.run = null;
    this.unpoint();
  }

  show(run) {
    this.run = run;
    const points = run?.points ?? [];
    // As in the loss picture: single steps can have many times the usual loss.
    const ordered = points.map(([, loss]) => loss).sort((a, b) => a - b);
    const top = Math.max(ordered[Math.floor(0.98 * (ordered.length - 1))] ?? 0, ...points.map((p) => p[2]), 1e-12) * 1.05;
    const x = (step) => (step / run.steps) * WIDTH, y = (loss) => HEIGHT - (Math.min(loss, top) / top) * HEIGHT;
    if (run) {
      this.raw.setAttribute("d", path(points.map(([step, loss]) => [x(step), y(loss)])));
      this.mean.setAttribute("d", path(points.map(([step, , mean]) => [x(step), y(mean)])));
    } else {
      this.raw.removeAttribute("d");
      this.mean.removeAttribute("d");
    }
    this.empty.hidden = points.length > 0;
    setText(this.top, points.length ? short(top) : "");
    setText(this.last, points.length ? t("steps", { steps: run.steps }) : "");
    const now = points.at(-1);
    this.drawing.setAttribute("aria-label", now
      ? t("chart_label", { step: now[0], steps: run.steps, loss: short(now[1]), mean: short(now[2]) }) : t("idle"));
    this.tellValue();
  }

  tellValue() {
    const points = this.run?.points ?? [];
    const told = this.pointed == null ? points.at(-1)
      : points.reduce((best, p) => (Math.abs(p[0] - this.pointed) < Math.abs(best[0] - this.pointed) ? p : best), points[0]);
    this.cursor.style.display = this.pointed == null || !told ? "none" : "";
    if (told && this.pointed != null) {
      const x = (told[0] / this.run.steps) * WIDTH;
      this.cursor.setAttribute("x1", x);
      this.cursor.setAttribute("x2", x);
    }
    setText(this.value, !told ? "" : this.pointed == null ? t("loss", { mean: short(told[2]) })
      : t("loss_at", { step: told[0], loss: short(told[1]), mean: short(told[2]) }));
  }

  point(event) {
    const box = this.drawing.getBoundingClientRect();
    this.pointed = ((event.clientX - box.left) / box.width) * (this.run?.steps ?? 1);
    this.tellValue();
  }

  unpoint() {
    this.pointed = null;
    this.tellValue();
  }
}

export class TrainingPanel {
  constructor(node) {
    this.node = node;
    this.state = html("span", { class: "tlora-state", role: "status" });
    this.step = html("span", { class: "tlora-strong" });
    this.pace = html("div", { class: "tlora-numbers" });
    this.bar = html("div", { class: "tlora-bar", role: "progressbar", "aria-label": t("training"), "aria-valuemin": 0 },
                    (this.filled = html("div")));
    this.chart = new LossChart();
    this.scores = new ScoresChart();
    this.strip = new Strip((step) => this.scores.choose(step));
    this.message = html("div", { class: "tlora-message", role: "status" });
    this.stop = this.button("stop");
    this.checkpoint = this.button("checkpoint");
    this.fold = html("button", { class: "tlora-button tlora-fold", onclick: () => this.toggle() });
    this.plan = html("div", { class: "tlora-plan" });
    this.pictures = picturesOf(node);
    this.element = html("div", { class: "tlora tlora-panel", role: "group", "aria-label": t("training") },
                        html("div", { class: "tlora-row" }, this.state, this.step), this.plan, this.pictures.element, this.bar, this.pace,
                        this.chart.element, this.scores.element, this.strip.element, this.message,
                        html("div", { class: "tlora-buttons" }, this.stop, this.checkpoint, this.fold));
    const { widget, resize } = addPanel(node, "tlora_training", this.element, HEIGHT_IDLE);
    this.resize = resize;
    widget.beforeQueued = () => mark(node);
    keepShort(node, widget);
    followNode(node, () => this.update());
  }

  button(wish) {
    return html("button", { class: "tlora-button", title: t(`${wish}_tip`), onclick: () => this.ask(wish) });
  }

  async ask(wish) {
    if (this.run && !(await ask(this.run, wish))) setText(this.state, t("not_reached"));
  }

  async tellPlan() {
    const at = (this.latest = {}); // answers may arrive out of order
    const { text, isWrong } = await planOf(this.node);
    if (at !== this.latest) return;
    setText(this.plan, text);
    this.plan.title = text;
    this.plan.classList.toggle("tlora-wrong", isWrong);
  }

  /** Before a run; during it there is more to see. */
  async tellPictures() {
    if (await this.pictures.update()) this.fit();
  }

  fit() {
    const { run } = this, isHidden = run?.state === "running" || !this.pictures.height;
    this.pictures.element.hidden = isHidden;
    const lines = Math.min(Math.ceil(this.message.textContent.length / CHARACTERS), MOST_LINES);
    this.resize(HEIGHT_IDLE + (isHidden ? 0 : HEIGHT_GAP + this.pictures.height) + (run?.steps ? HEIGHT_RUN : 0)
                + (this.scores.height ? HEIGHT_GAP + this.scores.height : 0)
                + (run?.pictures.length ? HEIGHT_STRIP : 0) + (lines ? HEIGHT_GAP + lines * HEIGHT_LINE : 0));
  }

  toggle() {
    toggleAdvanced(this.node);
    this.update();
  }

  update() {
    this.fold.hidden = drawsElements();
    setText(this.fold, t(this.node.showAdvanced ? "fold" : "unfold"));
    this.tellPlan();
    this.tellPictures();
    const run = runOf(this.node);
    if (run === this.run) return;
    this.run = run;
    const state = run?.state ?? "idle", runs = state === "running", wishes = run?.wishes ?? [];
    this.element.dataset.state = state;
    setText(this.state, t(`state_${state}`));
    setText(this.step, run?.steps ? `${run.step} / ${run.steps}` : "");
    this.pace.replaceChildren(...(run ? numbers(run) : []).map((text) => html("span", {}, text)));
    this.pace.title = wayOf(run?.way);
    this.bar.setAttribute("aria-valuemax", run?.steps ?? 0);
    this.bar.setAttribute("aria-valuenow", run?.step ?? 0);
    this.filled.style.width = run?.steps ? `${(100 * run.step) / run.steps}%` : "0";
    this.chart.show(run);
    this.scores.show(run);
    this.strip.show(run);
    for (const part of [this.bar, this.pace, this.chart.element]) part.hidden = !run?.steps;
    const isNamed = run?.message.includes(run.file);
    const said = [run?.message, run?.file && !isNamed && t("saved_as", { file: run.file })].filter(Boolean).join(" ");
    setText(this.message, said);
    this.message.title = said;
    this.message.hidden = !said;
    for (const [button, wish] of [[this.stop, "stop"], [this.checkpoint, "checkpoint"]]) {
      const asked = runs && wishes.includes(wish);
      setText(button, t(asked ? `${wish}_asked` : wish));
      button.disabled = !runs || asked;
    }
    this.fit();
  }
}

function numbers({ state, rate, left, memory: megabytes, memory_kind: kind, way }) {
  const pace = rate == null ? [] : [rate >= 1 ? t("rate", { rate: rate.toFixed(1) }) : t("seconds", { seconds: (1 / rate).toFixed(1) })];
  const held = megabytes == null ? [] : [t(kind === "process" ? "memory_process" : "memory_device", { memory: memory(megabytes) })];
  const time = left == null || state !== "running" ? [] : [t("left", { time: duration(left) })];
  return [...pace, ...time, ...held, ...(way ? [t("way", { way: way.memory })] : [])];
}

function wayOf(way) {
  const gib = (bytes) => (bytes / 2 ** 30).toFixed(1);
  if (!way) return "";
  if (way.in_ram === null) return t("way_by_host");
  return t(`way_${way.memory}`, { in_ram: gib(way.in_ram), weights: gib(way.weights) });
}
