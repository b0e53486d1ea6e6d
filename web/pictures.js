// The training pictures with their masks: before a run where Load Image tells them, on T-LoRA Images also after it.
import { api } from "../../scripts/api.js";
import { addPanel, html, setText } from "./dom.js";
import { after, changed, followNode, isLinked, source, values } from "./graph.js";
import { showLarge } from "./lightbox.js";
import { resolutionOf } from "./plan.js";
import { t } from "./texts.js";

const IMAGES = "TLoRAImages";
const STRIP = 88, LINE = 16, GAP = 6, FRAME = 34, CHARACTERS = 46; // pixels, and characters of a line, as in panel.js
const LOADERS = ["LoadImage", "LoadImageOutput"];

const answers = new Map(); // request -> promise
const ran = new WeakMap(); // T-LoRA Images node -> the server's answer when it ran

/** Call after a refresh or when a graph is loaded, because files may have been replaced. */
export const forgetPictures = () => answers.clear();

/** Call when a T-LoRA Images node has run, with what it reports. */
export function picturesRan(node, { tlora_pictures: pictures, tlora_pictures_count: [count] }) {
  const shown = pictures.map(({ file, ...rest }) => ({ ...rest, source: api.apiURL(`/view?${new URLSearchParams(file)}`) }));
  ran.set(node, { pictures: shown, count });
  changed();
}

/** The file of a loader that runs as it stands; null if another node decides. */
const fileOf = (node) => (node?.mode === 0 && !isLinked(node, "image") && values(node).image) || null;

/** What is connected to `mask`, for the server; null for nothing, undefined if only the run tells. */
function maskOf(node) {
  if (!isLinked(node, "mask")) return null;
  let from = source(node, "mask"), isInverted = false;
  for (let hops = 0; from?.type === "InvertMask" && from.mode === 0 && hops < 30; hops++) {
    isInverted = !isInverted;
    from = source(from, "mask");
  }
  const image = [...LOADERS, "LoadImageMask"].includes(from?.type) ? fileOf(from) : null;
  if (!image) return undefined;
  return { image, channel: from.type === "LoadImageMask" ? values(from).channel : "alpha", is_inverted: isInverted };
}

/** The pictures with masks that nodes give to `node`: {image, mask} for the server, or null where only the run tells. */
function itemsOf(node) {
  const from = source(node, "image"), image = LOADERS.includes(from?.type) ? fileOf(from) : null, mask = maskOf(node);
  if (image && mask !== undefined) return [{ image, mask }];
  return mask === null ? [] : [null]; // nothing is known of a picture without a mask, and nothing needs to be
}

function allItemsOf(node) {
  const items = itemsOf(node);
  for (let hops = 0, from = source(node, "more_images"); from?.type === IMAGES && from.mode === 0 && hops < 30; hops++) {
    items.push(...itemsOf(from));
    from = source(from, "before");
  }
  return items;
}

async function ask(items, framing, resolution) {
  const body = JSON.stringify({ items, framing, resolution });
  if (!answers.has(body)) {
    const request = { method: "POST", body, headers: { "Content-Type": "application/json" } };
    answers.set(body, api.fetchApi("/tlora/pictures", request).then((answer) => (answer.ok ? answer.json() : {})).catch(() => ({})));
    if (answers.size > 20) answers.delete(answers.keys().next().value);
  }
  return answers.get(body);
}

/** The weight of what a mask leaves out; undefined if the options node is not known. */
function outsideOf(node) {
  if (!isLinked(node, "options")) return 0;
  const options = source(node, "options");
  return options && !isLinked(options, "outside_mask") ? values(options).outside_mask : undefined;
}

/** The line below pictures of which some are masked. */
function tintOf(node) {
  const outside = node.comfyClass === IMAGES ? undefined : outsideOf(node);
  if (outside === undefined) return t("mask_tint");
  return outside ? t("mask_outside", { outside }) : t("mask_inside");
}

/** A row of small pictures, of which a click enlarges one, and lines on them. */
class Pictures {
  constructor(node) {
    this.node = node;
    this.isWhole = node.comfyClass === IMAGES; // the Train node frames them
    this.row = html("div", { class: "tlora-pictures" });
    this.words = html("div", { class: "tlora-words", role: "status" });
    this.element = html("div", { class: "tlora-masked" }, this.row, this.words);
    this.height = 0;
  }

  /** Shows the node's pictures as they are connected now. True unless a later call has begun. */
  async update() {
    const at = (this.latest = {}); // answers may arrive out of order
    const found = await this.find();
    if (at !== this.latest) return false;
    const { pictures, lines, isWrong } = found;
    const sources = pictures.map((picture) => picture.source).join();
    if (sources !== this.sources) this.row.replaceChildren(...pictures.map((_, i) => this.thumbnail(pictures, i)));
    this.sources = sources;
    setText(this.words, lines.join(" "));
    this.words.classList.toggle("tlora-wrong", isWrong);
    [this.row.hidden, this.words.hidden] = [!pictures.length, !lines.length];
    const rows = Math.ceil(lines.join(" ").length / CHARACTERS);
    this.height = (pictures.length ? STRIP : 0) + (pictures.length && rows ? GAP : 0) + rows * LINE;
    this.element.hidden = !this.height;
    return true;
  }

  /** {pictures, lines, isWrong} of what to show. */
  async find() {
    const items = this.isWhole ? itemsOf(this.node) : allItemsOf(this.node), known = items.filter(Boolean);
    const framing = isLinked(this.node, "framing") ? null : values(this.node).framing;
    let answer = {};
    if (known.length) answer = await (this.isWhole ? ask(known, null, 1024) : ask(known, framing, await resolutionOf(this.node)));
    else if (this.isWhole) answer = ran.get(this.node) ?? {};
    return this.tell(answer, items.includes(null) && !(this.isWhole && answer.pictures));
  }

  tell({ wrong, pictures = [], count }, isLater) {
    const masked = pictures.some((picture) => picture.is_masked), warnings = new Set(pictures.map((picture) => picture.warning));
    warnings.delete("");
    const isShown = this.isWhole || masked || warnings.size > 0;
    const lines = [wrong, ...[...warnings].map((warning) => t(`mask_${warning}`)), masked && tintOf(this.node),
                   isShown && count > pictures.length && t("mask_more", { count: count - pictures.length }),
                   (isLater || (this.isWhole && !pictures.length && !wrong)) && t(this.isWhole ? "pictures_later" : "mask_later")];
    return { pictures: isShown ? pictures : [], lines: lines.filter(Boolean), isWrong: Boolean(wrong || warnings.size) };
  }

  thumbnail(pictures, index) {
    const pages = pictures.map(({ source: large, is_masked: masked, warning }) => ({
      source: large, title: t("training_picture"), caption: warning ? t(`mask_${warning}`) : masked ? tintOf(this.node) : "" }));
    return html("button", { class: "tlora-picture", title: t("enlarge"), onclick: () => showLarge(pages, index, t("training_pictures")) },
                html("img", { src: pages[index].source, alt: pages[index].caption || pages[index].title }));
  }
}

/** The pictures of the Train node, for its panel. */
export const picturesOf = (node) => new Pictures(node);

/** The panel of T-LoRA Images. */
export function addPictures(node) {
  const pictures = new Pictures(node);
  const element = html("div", { class: "tlora tlora-panel", role: "group", "aria-label": t("training_pictures") }, pictures.element);
  const { resize } = addPanel(node, "tlora_pictures", element, FRAME + LINE);
  after(node, "onConnectionsChange", () => ran.delete(node));
  followNode(node, async () => (await pictures.update()) && resize(FRAME + pictures.height));
}
