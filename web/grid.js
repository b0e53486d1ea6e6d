// The validation pictures over the page: all steps and prompts as a table, or one picture as large as the window allows.
import { html, setText } from "./dom.js";
import { saveGrid } from "./grid_picture.js";
import { openDialog, signButton } from "./lightbox.js";
import { picturePath } from "./runs.js";
import { figuresOf, isBest, nameStep, scoresAt } from "./scores.js";
import { t } from "./texts.js";

const LEAST = 96, MOST = 768; // pixels of a picture's width in the table; the server keeps no larger ones
const USUAL = 320, BESIDE = 190, GAP = 12; // the same where there is room; of the table's first column; between pictures

/**
 * A run's pictures: {prompts, rows: [{step, name, isBest, figures, source, cells}, ...], sentence}. A row is a validation: `source` holds
 * its pictures side by side, and `cells` are the figures [[measure, text], ...] of each.
 */
function gridOf(run) {
  const rows = run.pictures.map((picture) => ({
    step: picture.step, name: nameStep(run, picture.step), isBest: isBest(run, picture.step), figures: figuresOf(scoresAt(run, picture.step)),
    source: picturePath(run, picture), cells: picture.captions.map((_, place) => figuresOf(picture.scores?.[place])),
  }));
  return { prompts: run.pictures.at(-1).captions, rows, sentence: run.scores?.sentence ?? "" };
}

/** Picture `place` of `count` that `source` holds side by side; `own`: attributes of the image. */
function crop(source, place, count, own) {
  const frame = html("span", { class: "tlora-crop" }, html("img", { ...own, src: source }));
  frame.style.setProperty("--count", count);
  frame.style.setProperty("--place", place);
  return frame;
}

const figureList = (figures) => html("span", { class: "tlora-figures" }, ...figures.map(([name, value]) =>
  html("span", { class: `tlora-${name}` }, html("span", { class: "tlora-name" }, t(name)), " ", html("span", { class: "tlora-strong" }, value))));

class Gallery {
  constructor(run, at, isTable) {
    this.grid = gridOf(run);
    const { prompts, rows } = this.grid, count = prompts.length;
    this.cells = rows.flatMap((row) => prompts.map((prompt, place) => ({ row, prompt, place, figures: row.cells[place] ?? [] })));
    this.buttons = this.cells.map((cell, i) => html("button", { class: "tlora-picture", tabindex: -1, title: t("enlarge"),
      "aria-label": this.label(cell), onclick: () => this.show(i, false), onfocus: () => this.reach(i) },
      crop(cell.row.source, cell.place, count, { alt: "", loading: "lazy", onload: (event) => this.shape(event.target) })));
    this.table = this.tableOf();
    this.one = html("figure", { class: "tlora-one", tabindex: -1, "aria-live": "polite" });
    this.said = html("span", { class: "tlora-said", role: "status" });
    this.turns = Object.entries({ ArrowLeft: ["‹", "previous"], ArrowRight: ["›", "next"], ArrowUp: ["↑", "step_before"], ArrowDown: ["↓", "step_after"] })
      .map(([key, [sign, name]]) => ({ key, button: signButton(sign, name, () => this.move(key)) }));
    this.size = html("input", { type: "range", min: LEAST, max: MOST, "aria-label": t("grid_size"), title: t("grid_size"), oninput: () => this.scale() });
    this.size.value = Math.min((window.innerWidth * 0.94 - BESIDE) / count - GAP, USUAL);
    this.other = html("button", { class: "tlora-button", onclick: () => this.show(this.at, !this.isTable) });
    this.save = html("button", { class: "tlora-button", title: t("grid_save_tip"), onclick: () => this.export() }, t("grid_save"));
    this.dialog = openDialog(t("validation"), (event) => this.press(event), this.table, this.one,
                             html("div", { class: "tlora-row" }, ...this.turns.map(({ button }) => button), this.other, this.size, this.save, this.said,
                                  signButton("×", "close", () => this.dialog.close())));
    this.dialog.classList.add("tlora-gallery");
    this.scale();
    this.show(at, isTable);
  }

  label({ row, prompt }) {
    return t("picture_label", { step: row.step, caption: prompt });
  }

  tableOf() {
    const { prompts, rows } = this.grid;
    const head = prompts.map((prompt) => html("th", { scope: "col", title: prompt }, html("span", { class: "tlora-prompt" }, prompt)));
    const body = rows.map((row, i) => html("tr", { class: row.isBest ? "tlora-best" : null },
      html("th", { scope: "row" }, row.name, figureList(row.figures)),
      ...prompts.map((_, place) => html("td", {}, this.buttons[i * prompts.length + place], figureList(row.cells[place] ?? [])))));
    return html("div", { class: "tlora-scroll" }, html("table", {}, html("caption", {}, t("grid_label")),
      html("thead", {}, html("tr", {}, html("th", { scope: "col" }, t("step")), ...head)), html("tbody", {}, ...body)));
  }

  /** Shows picture `at`, counted row by row, in the table or alone. */
  show(at, isTable) {
    this.isTable = isTable;
    for (const part of [this.table, this.size]) part.hidden = !isTable;
    for (const part of [this.one, ...this.turns.map(({ button }) => button)]) part.hidden = isTable;
    setText(this.other, t(isTable ? "grid_one" : "grid"));
    this.turnTo(at);
    if (!isTable) this.one.focus();
  }

  turnTo(at) {
    this.reach(at);
    if (this.isTable) return void this.buttons[at].focus();
    const cell = this.cells[at], own = { alt: this.label(cell), decoding: "sync", onload: (event) => this.shape(event.target) };
    const words = [html("strong", {}, cell.row.name), html("span", {}, cell.prompt), figureList(cell.figures)];
    this.one.replaceChildren(crop(cell.row.source, cell.place, this.grid.prompts.length, own), html("figcaption", {}, ...words));
    if (document.activeElement?.disabled) this.one.focus(); // keys would be lost with a button that has reached its end
  }

  /** Gives all pictures the shape of one that is there: those of a run are of one size. */
  shape({ naturalWidth, naturalHeight }) {
    this.dialog.style.setProperty("--ratio", naturalWidth / this.grid.prompts.length / naturalHeight);
  }

  /** Makes `at` the chosen picture, which the Tab key reaches in the table. */
  reach(at) {
    this.buttons[this.at ?? at].tabIndex = -1;
    this.buttons[at].tabIndex = 0;
    this.at = at;
    for (const { key, button } of this.turns) button.disabled = this.after(key) == null;
  }

  /** The picture to which a key leads; undefined for other keys and beyond the ends. */
  after(key) {
    const row = this.grid.prompts.length, last = this.cells.length - 1;
    const at = { ArrowLeft: this.at - 1, ArrowRight: this.at + 1, ArrowUp: this.at - row, ArrowDown: this.at + row, Home: 0, End: last }[key];
    return at >= 0 && at <= last ? at : undefined;
  }

  move(key) {
    const at = this.after(key);
    if (at != null) this.turnTo(at);
  }

  press(event) {
    if (event.target === this.size || !/^(Arrow|Home|End)/.test(event.key)) return;
    event.preventDefault(); // it would scroll
    this.move(event.key);
  }

  scale() {
    this.table.style.setProperty("--cell", `${this.size.value}px`);
  }

  async export() {
    if (this.isSaving) return; // a disabled button would lose the keys
    this.isSaving = true;
    setText(this.said, t("grid_saving"));
    setText(this.said, await saveGrid(this.grid).catch(() => t("grid_failed")));
    this.isSaving = false;
  }
}

/** Shows all validation pictures of a run, at the first picture of validation `row`. */
export const showGrid = (run, row) => new Gallery(run, row * run.pictures.at(-1).captions.length, true);

/** Shows the picture of validation `row` and prompt `place`. */
export const showOne = (run, row, place) => new Gallery(run, row * run.pictures.at(-1).captions.length + place, false);
