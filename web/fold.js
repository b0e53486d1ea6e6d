// Keeps a node with many inputs short: its panel comes first, and the canvas renderer folds its advanced inputs, as the
// other renderer does by itself.
import { app } from "../../scripts/app.js";
import { after, isLinked } from "./graph.js";

const WIDTH = 340; // pixels of a new node; fits the panel's line and buttons

const setting = (name) => app.extensionManager?.setting?.get(name);

/** Whether the frontend draws nodes as elements; it then has its own button for advanced inputs. */
export const drawsElements = () => Boolean(globalThis.LiteGraph?.vueNodesMode);

/** Whether an input is folded, by the rule of the other renderer, which also calls this to compute a node's size. */
const isFolded = (node, widget) => Boolean(widget.options?.advanced) && !node.showAdvanced
  && !setting("Comfy.Node.AlwaysShowAdvancedWidgets") && !isLinked(node, widget.name);

/** Folds a node's advanced inputs and moves the widget `first` to the top. Values keep their saved order. */
export function keepShort(node, first) {
  keepInSight(node, "captions");
  first.element.classList.add("tlora-first"); // used by the other renderer, see tlora.css
  if (!node.getLayoutWidgets) return; // an older frontend shows all inputs in order
  const { isWidgetVisible, isWidgetRowVisible, getLayoutWidgets } = node;
  node.isWidgetVisible = (widget) => !isFolded(node, widget) && isWidgetVisible.call(node, widget);
  if (isWidgetRowVisible) node.isWidgetRowVisible = (widget) => !isFolded(node, widget) && isWidgetRowVisible.call(node, widget);
  node.getLayoutWidgets = () => {
    const others = getLayoutWidgets.call(node).filter((widget) => widget !== first && !isFolded(node, widget));
    return [first, ...others];
  };
  node.setSize([Math.max(node.size[0], WIDTH), node.computeSize()[1]]); // it was created with the height of all inputs
}

/** An advanced text about the data stays visible when it is set, because it fits some pictures and not others. */
function keepInSight(node, name) {
  const widget = node.widgets.find((each) => each.name === name);
  if (!widget?.options?.advanced) return;
  const look = () => {
    widget.options.advanced = !widget.value;
    node.widgets = [...node.widgets]; // makes the other renderer update
  };
  after(node, "onConfigure", look);
}

/** Folds or shows the advanced inputs. */
export function toggleAdvanced(node) {
  const [, before] = node.computeSize();
  node.showAdvanced = !node.showAdvanced;
  const [width, after] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(after, node.size[1] + after - before)]);
  node.setDirtyCanvas?.(true, true);
}
