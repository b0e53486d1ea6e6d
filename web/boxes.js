// Text boxes in the canvas renderer, which shows no name on filled boxes and gives new nodes only one line.
import { app } from "../../scripts/app.js";

const MARGIN = 15; // around the box: makes it as wide as other widgets, with room for a name above
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

/** Adds names and height to the node's text boxes; the other renderer shows names itself. */
export function nameBoxes(node) {
  const boxes = (node.widgets ?? []).filter(({ element }) => element instanceof HTMLTextAreaElement);
  if (!boxes.length) return;
  for (const box of boxes) {
    box.options.margin = MARGIN;
    box.options.getMinHeight = () => LEAST;
    box.element.placeholder = ""; // the host's placeholder is the English name
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
