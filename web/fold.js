// A node of many inputs, kept short: its panel first, and advanced inputs folded away where the canvas draws it, as the other
// renderer does by itself.
import { app } from "../../scripts/app.js";
import { after, isLinked } from "./graph.js";

const WIDTH = 340; // pixels of a fresh node, for the panel's line and buttons

const setting = (name) => app.extensionManager?.setting?.get(name);

/** Whether the frontend draws nodes as elements; it then has a button of its own for advanced inputs. */
export const drawsElements = () => Boolean(globalThis.LiteGraph?.vueNodesMode);

/** As the other renderer decides; asked there too, when it reckons a node's size. */
const isFolded = (node, widget) => Boolean(widget.options?.advanced) && !node.showAdvanced
  && !setting("Comfy.Node.AlwaysShowAdvancedWidgets") && !isLinked(node, widget.name);

/** Folds the advanced inputs of a node, and puts the widget `first` above all. Values keep their order: it is the saved one. */
export function keepShort(node, first) {
  keepInSight(node, "captions");
  first.element.classList.add("tlora-first"); // for the other renderer, see tlora.css
  if (!node.getLayoutWidgets) return; // an older frontend shows all, in order
  const { isWidgetVisible, isWidgetRowVisible, getLayoutWidgets } = node;
  node.isWidgetVisible = (widget) => !isFolded(node, widget) && isWidgetVisible.call(node, widget);
  if (isWidgetRowVisible) node.isWidgetRowVisible = (widget) => !isFolded(node, widget) && isWidgetRowVisible.call(node, widget);
  node.getLayoutWidgets = () => {
    const others = getLayoutWidgets.call(node).filter((widget) => widget !== first && !isFolded(node, widget));
    return [first, ...others];
  };
  node.setSize([Math.max(node.size[0], WIDTH), node.computeSize()[1]]); // as long as all its inputs, when it was made
}

/** An advanced text that says something about the data stays in sight: it is true of some pictures and not of others. */
function keepInSight(node, name) {
  const widget = node.widgets.find((each) => each.name === name);
  if (!widget?.options?.advanced) return;
  const look = () => {
    widget.options.advanced = !widget.value;
    node.widgets = [...node.widgets]; // the other renderer looks anew
  };
  after(node, "onConfigure", look);
}

/** Folds the advanced inputs, or shows them. */
export function toggleAdvanced(node) {
  const [, before] = node.computeSize();
  node.showAdvanced = !node.showAdvanced;
  const [width, after] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(after, node.size[1] + after - before)]);
  node.setDirtyCanvas?.(true, true);
}
