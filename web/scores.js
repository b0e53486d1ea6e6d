// The scores of the validations over the steps: likeness, obedience and copying, each in a lane with a scale of its own.
import { html, path, setText, svg } from "./dom.js";
import { t } from "./texts.js";

export const MEASURES = ["likeness", "obedience", "copying"];

const WIDTH = 1000, HEIGHT = 100; // a lane's coordinates, stretched to the element
const LEAST_SPAN = 0.02; // of a lane's scale, so that an even curve looks even
const HEIGHT_TITLE = 18, HEIGHT_LANE = 48, HEIGHT_LINE = 16, CHARACTERS = 46; // pixels, and characters of a line, as in panel.js

export const isBest = (run, step) => run.scores != null && run.scores.best === step;

/** "step 420", with a word if it is the best. */
export const nameStep = (run, step) => t(isBest(run, step) ? "at_best_step" : "at_step", { step });

const figure = (value, error) => (error == null ? value.toFixed(3) : `${value.toFixed(3)} ± ${error.toFixed(3)}`);

/** [[name, "0.712 ± 0.010"], ...] of what is measured in {likeness, likeness_error, obedience, ...}; empty for null. */
export const figuresOf = (scores) => MEASURES.filter((name) => scores?.[name] != null)
  .map((name) => [name, figure(scores[name], scores[`${name}_error`])]);

/** "likeness 0.712 ± 0.010, copying 0.200": `figuresOf` in one line. */
export const sayScores = (scores) => figuresOf(scores).map(([name, value]) => t("score", { name: t(name), value })).join(", ");

/** The scores of a step {step, likeness, likeness_error, ...}; undefined where it has none. */
export const scoresAt = (run, step) => run.scores?.steps.find((scores) => scores.step === step);

class Lane {
  constructor(name) {
    this.name = name;
    [this.band, this.whiskers, this.line, this.dots, this.best] = ["band", "whiskers", "line", "dots", "dots tlora-best"]
      .map((part) => svg("path", { class: `tlora-${part}` }));
    this.range = html("span", { class: "tlora-range" });
    this.value = html("span", { class: "tlora-strong" });
    const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" },
                        this.band, this.whiskers, this.line, this.dots, this.best);
    this.element = html("div", { class: `tlora-lane tlora-${name}`, title: t(`${name}_tip`) },
                        html("div", { class: "tlora-row" }, html("span", { class: "tlora-name" }, t(name)), this.range, this.value), drawing);
  }

  /** Draws the measured ones of `steps` [{step, likeness, likeness_error, ...}, ...], with `last` at the right end. */
  show(steps, best, last) {
    const points = steps.filter((scores) => scores[this.name] != null)
      .map((scores) => ({ step: scores.step, mean: scores[this.name], error: scores[`${this.name}_error`] ?? 0 }));
    this.element.hidden = !points.length;
    if (!points.length) return;
    const [low, high] = [Math.min(...points.map((p) => p.mean - p.error)), Math.max(...points.map((p) => p.mean + p.error))];
    const span = Math.max(high - low, LEAST_SPAN), bottom = (low + high - span) / 2;
    const place = ({ step, mean }, errors = 0, error = 0) => [(step / last) * WIDTH, HEIGHT * (1 - (mean + errors * error - bottom) / span)];
    const [upper, lower] = [1, -1].map((errors) => points.map((point) => place(point, errors, point.error)));
    const dot = (point) => `${path([place(point)])}h0`; // the stroke's round ends keep their shape in a stretched drawing
    this.band.setAttribute("d", `${path([...upper, ...[...lower].reverse()])}Z`);
    this.whiskers.setAttribute("d", upper.map((end, i) => path([end, lower[i]])).join(""));
    this.line.setAttribute("d", path(points.map((point) => place(point))));
    this.dots.setAttribute("d", points.map(dot).join(""));
    this.best.setAttribute("d", points.filter(({ step }) => step === best).map(dot).join(""));
    const [least, most] = [Math.min(...points.map((p) => p.mean)), Math.max(...points.map((p) => p.mean))].map((mean) => mean.toFixed(2));
    setText(this.range, least === most ? "" : t("score_range", { least, most }));
  }
}

/** The curves with the best step marked, and the sentence on it. Hidden while there is nothing to show. */
export class ScoresChart {
  constructor() {
    this.title = html("span", { class: "tlora-strong" });
    this.mark = html("span", { class: "tlora-mark" });
    this.lanes = MEASURES.map((name) => new Lane(name));
    this.rule = html("span", { class: "tlora-rule" });
    this.cursor = html("span", { class: "tlora-rule tlora-pointed" });
    this.plot = html("div", { class: "tlora-lanes", role: "img", onpointermove: (event) => this.point(event), onpointerleave: () => this.point(null) },
                     this.rule, this.cursor, html("div", { class: "tlora-row" }, this.title, this.mark), ...this.lanes.map(({ element }) => element));
    this.sentence = html("div", { class: "tlora-sentence", role: "status" });
    this.element = html("div", { class: "tlora-scores" }, this.plot, this.sentence);
    this.pointed = this.chosen = null; // steps
    this.show(null);
  }

  show(run) {
    this.run = run;
    const { steps = [], best = null, sentence: told = "" } = run?.scores ?? {};
    const sentence = run?.message.includes(told) ? "" : told; // the end of a run says it with what the file holds
    this.steps = steps;
    for (const lane of this.lanes) lane.show(steps, best, run?.steps);
    const lanes = this.lanes.filter(({ element }) => !element.hidden).length;
    this.plot.hidden = !lanes;
    setText(this.sentence, sentence);
    this.sentence.title = sentence;
    this.element.hidden = !lanes && !sentence;
    this.height = (lanes ? HEIGHT_TITLE + lanes * HEIGHT_LANE : 0) + Math.ceil(sentence.length / CHARACTERS) * HEIGHT_LINE;
    this.rule.hidden = best == null;
    if (best != null) this.rule.style.left = this.left(best);
    setText(this.mark, best == null ? "" : t("best_at", { step: best }));
    this.tell();
  }

  left(step) {
    return `${(100 * step) / this.run.steps}%`;
  }

  /** Tells the scores of a step whose pictures are shown; null for the newest. */
  choose(step) {
    this.chosen = step;
    this.tell();
  }

  tell() {
    const at = this.pointed ?? this.chosen, { steps } = this;
    const told = at == null ? steps.at(-1) : steps.reduce((best, one) => (Math.abs(one.step - at) < Math.abs(best.step - at) ? one : best), steps[0]);
    this.cursor.hidden = !told || at == null;
    if (!told) return;
    this.cursor.style.left = this.left(told.step);
    setText(this.title, t("scores_at", { step: told.step }));
    const figures = new Map(figuresOf(told));
    for (const { name, value } of this.lanes) setText(value, figures.get(name) ?? "–");
    const label = t("scores_label", { step: told.step, scores: sayScores(told) });
    this.plot.setAttribute("aria-label", `${label} ${this.mark.textContent}`.trim());
  }

  point(event) {
    const box = this.plot.getBoundingClientRect();
    this.pointed = event && ((event.clientX - box.left) / box.width) * this.run.steps;
    this.tell();
  }
}
