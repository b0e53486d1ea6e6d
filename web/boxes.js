// Text boxes in the canvas renderer, which gives them neither a name once they are filled nor more than a line on a new node.
import { app } from "../../scripts/app.js";

const MARGIN = 15; // around the box: as wide as other widgets, and room for a name above
const FONT = "11px sans-serif", BASELINE = 11;
const LEAST = 3 * 13 + 2 * MARGIN + 6; // three lines

function drawNames(node, boxes, context) {
  if (node.flags.collapsed || app.canvas.low_quality) return;
  context.save();
  context.font = FONT;
  context.textAlign = "left";
  context.fillStyle = window.LiteGraph.WIDGET_SECONDARY_TEXT_COLOR;
  for (const box of boxes) {
    if (box.isVisible?.() ?? !box.hidden) context.fillText(box.label ?? box.name, MARGIN, box.y + BASELINE);
  }
  context.restore();
}

/** Gives the node's text boxes their names and height; the other renderer has names of its own. */
export function nameBoxes(node) {
  const boxes = (node.widgets ?? []).filter(({ element }) => element instanceof HTMLTextAreaElement);
  if (!boxes.length) return;
  for (const box of boxes) {
    box.options.margin = MARGIN;
    box.options.getMinHeight = () => LEAST;
    box.element.placeholder = ""; // its name in English
    box.element.setAttribute("aria-label", box.label ?? box.name);
  }
  const own = node.onDrawForeground;
  node.onDrawForeground = function (context, ...others) {
    own?.call(this, context, ...others);
    drawNames(this, boxes, context);
  };
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
}
