// Rank schedules on the Train, Load and Apply nodes, and the file's card on Load.
import { api } from "../../scripts/api.js";
import { CurveEditor } from "./curve.js";
import { addPanel, html, setText } from "./dom.js";
import { cardOf, thumbnailPath } from "./files.js";
import { changed, followNode, isLinked, nodeAt, source, values } from "./graph.js";
import { pointsOf, ScheduleChart, textOf } from "./schedule.js";
import { t } from "./texts.js";

const HEIGHT_CHART = 128, HEIGHT_CARD = 76;
const MASKED = ["auto", "tlora", "vanilla_tlora"];
const DECIDING = ["file", "method", "rank", "min_rank", "alpha", "curve"]; // inputs

const panels = new WeakMap(); // node -> SchedulePanel
const told = new WeakMap(); // node -> schedule of its last sampling

/** The first input that affects the schedule and gets its value from another node. */
const linkedOf = (node) => DECIDING.find((name) => isLinked(node, name));

function trainedSchedule(node) {
  const { rank, min_rank, alpha, method, curve } = values(node);
  if (!MASKED.includes(method)) return { rank, min_rank: rank, alpha: 1 };
  return { rank, min_rank, alpha, points: pointsOf(curve ?? "") };
}

/** The file's schedule, with the node's own settings applied. */
function loadedSchedule(node, file) {
  if (!file?.schedule) return null;
  const { min_rank: least, alpha } = values(node), formula = least >= 0 || alpha > 0 ? { points: [] } : {};
  return { ...file.schedule, ...formula, ...(least >= 0 && { min_rank: least }), ...(alpha > 0 && { alpha }) };
}

/** The schedule of a node's output T-LoRA, or null if it is unknown. */
async function scheduleOf(node) {
  if (node && linkedOf(node)) return null;
  if (node?.type === "TLoRATrainFromImage") return trainedSchedule(node);
  if (node?.type === "TLoRALoad") return loadedSchedule(node, await cardOf(node));
  return node && told.get(node);
}

class FileCard {
  constructor() {
    this.picture = html("img", { alt: "" });
    this.phrase = html("div", { class: "tlora-strong tlora-phrase" });
    this.facts = html("div", { class: "tlora-caption" });
    this.element = html("div", { class: "tlora-card" }, this.picture, html("div", { class: "tlora-beside" }, this.phrase, this.facts));
  }

  show(name, file) {
    this.picture.hidden = !file?.thumbnail;
    if (file?.thumbnail) this.picture.src = thumbnailPath(name);
    this.element.hidden = !file;
    setText(this.phrase, file?.phrase || t("no_phrase"));
    this.phrase.classList.toggle("tlora-none", !file?.phrase);
    const rank = file?.schedule?.rank ?? file?.rank;
    setText(this.facts, [file?.method ?? t("other_file"), rank && t("rank", { rank }), file?.base_model].filter(Boolean).join(" · "));
  }
}

class SchedulePanel {
  constructor(node) {
    this.node = node;
    this.chart = new ScheduleChart();
    this.card = node.comfyClass === "TLoRALoad" ? new FileCard() : null;
    this.element = html("div", { class: "tlora tlora-panel", role: "group", "aria-label": t("schedule") },
                        ...(this.card ? [this.card.element] : []), this.chart.element);
    const curve = node.widgets?.find((widget) => widget.name === "curve");
    this.editor = curve && new CurveEditor(this.chart, (points) => {
      curve.value = textOf(points);
      curve.callback?.(curve.value);
    });
    const { widget } = addPanel(node, "tlora_schedule", this.element, HEIGHT_CHART + (this.card ? HEIGHT_CARD : 0));
    if (curve) widget.options.advanced = true; // folded together with min_rank and alpha
    panels.set(node, this);
    followNode(node, () => this.update());
  }

  async update() {
    const at = (this.latest = {}); // answers may arrive out of order
    const { node } = this, linked = linkedOf(node);
    const file = this.card && !isLinked(node, "file") ? await cardOf(node) : null;
    const known = await scheduleOf(node.comfyClass === "TLoRAApply" ? source(node, "tlora") : node);
    if (at !== this.latest) return;
    this.card?.show(values(node).file, file);
    const reason = linked ? "linked" : !this.card ? "not_connected" : file ? "no_schedule" : "no_file";
    this.chart.show(linked ? null : known ?? told.get(node), t(reason, { name: linked }));
    this.editor?.show(MASKED.includes(values(node).method));
  }
}

export const addSchedule = (node) => void new SchedulePanel(node);

/** Moves the dot while a sampler runs. */
export function followSampling() {
  api.addEventListener("tlora.sampling", ({ detail }) => {
    const node = nodeAt(detail), panel = panels.get(node);
    if (!panel) return;
    const news = JSON.stringify(told.get(node)) !== JSON.stringify(detail.schedule);
    told.set(node, detail.schedule);
    panel.chart.sampling(detail);
    if (news) changed();
  });
}
