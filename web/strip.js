// The validation pictures in the panel: those of one step are shown, a slider selects the step, a click enlarges them.
import { html, setText } from "./dom.js";
import { showGrid, showOne } from "./grid.js";
import { picturePath } from "./runs.js";
import { nameStep, sayScores, scoresAt } from "./scores.js";
import { t } from "./texts.js";

export class Strip {
  /** Calls `choose(step)` with the step whose pictures are shown, null while it is the newest. */
  constructor(choose) {
    this.choose = choose;
    this.picture = html("img", { alt: "" });
    this.button = html("button", { class: "tlora-picture", title: t("enlarge"), onclick: (event) => this.enlarge(event) }, this.picture);
    this.slider = html("input", { type: "range", min: 0, "aria-label": t("validation"), oninput: () => this.scrub() });
    this.step = html("span", { class: "tlora-strong" });
    this.all = html("button", { class: "tlora-link", title: t("grid_tip"), onclick: () => showGrid(this.run, this.place) }, t("grid"));
    this.caption = html("div", { class: "tlora-caption" });
    this.element = html("div", { class: "tlora-strip" }, this.button,
                        html("div", { class: "tlora-beside" }, html("div", { class: "tlora-row" }, this.step, this.all), this.slider, this.caption));
    this.chosen = null; // index of the picture; null shows the newest
  }

  show(run) {
    if (run?.id !== this.run?.id) this.chosen = null;
    this.run = run;
    const pictures = run?.pictures ?? [];
    this.element.hidden = pictures.length === 0;
    if (!pictures.length) return;
    this.place = pictures.findIndex(({ index }) => index === this.chosen);
    if (this.place < 0) {
      this.chosen = null;
      this.place = pictures.length - 1;
    }
    const picture = pictures[this.place], source = picturePath(run, picture), name = nameStep(run, picture.step);
    this.choose(this.chosen === null ? null : picture.step);
    this.slider.max = pictures.length - 1;
    this.slider.value = this.place;
    this.slider.disabled = pictures.length < 2;
    this.slider.setAttribute("aria-valuetext", [name, sayScores(scoresAt(run, picture.step))].filter(Boolean).join(", "));
    if (this.picture.getAttribute("src") !== source) this.picture.setAttribute("src", source);
    const caption = picture.captions.join(" · ");
    this.picture.alt = t("picture_label", { step: picture.step, caption });
    setText(this.step, name);
    setText(this.caption, caption);
  }

  scrub() {
    const place = Number(this.slider.value), pictures = this.run.pictures;
    this.chosen = place === pictures.length - 1 ? null : pictures[place].index;
    this.show(this.run);
  }

  /** Shows the picture under the pointer, or the first one after a key. */
  enlarge(event) {
    const box = this.picture.getBoundingClientRect(), count = this.run.pictures[this.place].captions.length;
    const share = event.detail ? (event.clientX - box.left) / box.width : 0;
    showOne(this.run, this.place, Math.min(Math.max(Math.floor(share * count), 0), count - 1));
  }
}
