// Draws the table of validation pictures as one picture, with its steps, prompts and scores, and lets the browser save it.
import { t } from "./texts.js";

const FILE = "tlora_validation.png";
const MOST_SIDE = 16384, MOST_AREA = 64e6; // pixels of a picture that every browser can draw and save
const LEAST_CELL = 192; // pixels of a picture's width, for the texts below it
const INK = "#111", PAPER = "#fff", MARK = "#0b57d0"; // of the best step

const load = async (source) => {
  const picture = new Image();
  picture.src = source;
  await picture.decode();
  return picture;
};

/** `text` in lines of at most `width` pixels, broken between words or else, as in Chinese, between letters. */
function wrap(pen, text, width) {
  const lines = [""];
  for (const part of text.match(/\S+\s*|\s+/g) ?? []) {
    const letters = pen.measureText(part).width > width ? [...part] : [part];
    for (const letter of letters) {
      if (lines.at(-1) && pen.measureText(lines.at(-1) + letter.trimEnd()).width > width) lines.push("");
      lines[lines.length - 1] += letter;
    }
  }
  return lines;
}

class Sheet {
  /** Lays the grid out with pictures of `cell` pixels in width; `ratio`: width to height of a picture. */
  constructor({ prompts, rows, sentence }, cell, ratio) {
    this.canvas = document.createElement("canvas");
    this.pen = this.canvas.getContext("2d");
    Object.assign(this, { prompts, rows, cell, picture: cell / ratio });
    this.size = Math.min(Math.max(cell / 22, 13), 30);
    this.line = this.size * 1.35;
    this.gap = this.size;
    this.beside = this.size * 14;
    this.width = Math.ceil(this.gap + this.beside + prompts.length * (cell + this.gap));
    this.font();
    this.heads = prompts.map((prompt) => wrap(this.pen, prompt, cell));
    this.foot = sentence ? wrap(this.pen, sentence, this.width - 2 * this.gap) : [];
    this.top = this.gap * 2 + Math.max(...this.heads.map((lines) => lines.length)) * this.line;
    const lines = Math.max(0, ...rows.flatMap((row) => row.cells.map((figures) => figures.length)));
    this.pitch = Math.max(this.picture + lines * this.line, 5 * this.line) + this.gap * 1.5;
    this.height = Math.ceil(this.top + rows.length * this.pitch + this.foot.length * this.line + this.gap);
  }

  get fits() {
    return Math.max(this.width, this.height) <= MOST_SIDE && this.width * this.height <= MOST_AREA;
  }

  font(weight = "normal") {
    this.pen.font = `${weight} ${this.size}px Inter, system-ui, sans-serif`;
    this.pen.textBaseline = "top";
  }

  write(lines, x, y, weight) {
    this.font(weight);
    this.pen.fillStyle = INK;
    lines.forEach((line, i) => this.pen.fillText(line, x, y + i * this.line));
  }

  left(place) {
    return this.gap + this.beside + place * (this.cell + this.gap);
  }

  async draw() {
    Object.assign(this.canvas, { width: this.width, height: this.height });
    this.pen.imageSmoothingQuality = "high";
    this.pen.fillStyle = PAPER;
    this.pen.fillRect(0, 0, this.width, this.height);
    this.heads.forEach((lines, place) => this.write(lines, this.left(place), this.gap));
    for (const [i, row] of this.rows.entries()) this.drawRow(row, await load(row.source), this.top + i * this.pitch);
    this.write(this.foot, this.gap, this.top + this.rows.length * this.pitch, "bold");
    return this.canvas;
  }

  drawRow({ name, figures, cells, isBest }, picture, y) {
    const { pen, gap, cell } = this, width = picture.naturalWidth / this.prompts.length;
    const say = (list) => list.map(([measure, value]) => t("score", { name: t(measure), value }));
    this.write(wrap(pen, name, this.beside - gap), gap, y, "bold");
    this.write(say(figures).flatMap((line) => wrap(pen, line, this.beside - gap)), gap, y + 1.5 * this.line);
    cells.forEach((list, place) => {
      pen.drawImage(picture, place * width, 0, width, picture.naturalHeight, this.left(place), y, cell, this.picture);
      this.write(say(list), this.left(place), y + this.picture + gap / 4);
    });
    if (!isBest) return;
    pen.strokeStyle = MARK;
    pen.lineWidth = gap / 4;
    pen.strokeRect(gap / 2, y - gap / 2, this.width - gap, this.pitch - gap / 2);
  }
}

/** The sheet of the grid {prompts, rows, sentence}, see `gridOf`, and its pictures' size in percent of what they have. */
async function layOut(grid) {
  const first = await load(grid.rows[0].source), natural = first.naturalWidth / grid.prompts.length;
  let sheet, cell = Math.max(natural, LEAST_CELL);
  do sheet = new Sheet(grid, cell, natural / first.naturalHeight);
  while (!sheet.fits && (cell *= 0.98) > 1);
  return { sheet, percent: Math.round((100 * cell) / natural) };
}

/** Draws and saves the grid; returns what to say of it. Fails if a picture is gone. */
export async function saveGrid(grid) {
  const { sheet, percent } = await layOut(grid), canvas = await sheet.draw(), { width, height } = canvas;
  const blob = await new Promise((resolve, reject) => canvas.toBlob((made) => (made ? resolve(made) : reject(new Error("no picture"))), "image/png"));
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: FILE });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser may still be reading it
  return t(percent < 100 ? "grid_saved_small" : "grid_saved", { file: FILE, width, height, percent });
}
