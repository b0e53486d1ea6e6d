// Finds nodes in the graph and reports its changes.
import { app } from "../../scripts/app.js";

const watchers = new Set(); // {node, update}

/** Call when something has changed that panels show: a run, a value, a link, the graph. */
export function changed() {
  for (const { update } of [...watchers]) update();
}

/** Whether a node is in the open graph or in one of its subgraphs. */
function isOpen({ graph }) {
  const root = app.rootGraph ?? app.graph;
  return Boolean(graph) && (graph === root || root.subgraphs?.get(graph.id) === graph);
}

/** Call when another graph was opened: the frontend reports the removal of nodes outside subgraphs only. */
export function forgetClosed() {
  for (const watcher of watchers) if (!isOpen(watcher.node)) watchers.delete(watcher);
}

/** Makes `f` run after the object's own `method`. */
export function after(object, method, f) {
  const own = object[method];
  object[method] = function (...args) {
    const result = own?.apply(this, args);
    f();
    return result;
  };
}

/** The node that the host calls "3:7": node 7 in the subgraph of node 3. Null in another workflow. */
export function nodeAt({ node, workflow }) {
  let graph = app.rootGraph ?? app.graph;
  if (node == null || (workflow && graph.id && workflow !== graph.id)) return null;
  const ids = node.split(":");
  for (const id of ids.slice(0, -1)) graph = graph?.getNodeById(id)?.subgraph;
  return graph?.getNodeById(ids.at(-1)) ?? null;
}

/** The id for `nodeAt`; of a subgraph that is used several times, the first use. Null outside the open graph. */
export function pathOf({ id, graph }) {
  const root = app.rootGraph ?? app.graph;
  const within = (inner) => {
    if (inner === graph) return [id];
    for (const node of inner.nodes ?? []) {
      const path = node.subgraph && within(node.subgraph);
      if (path) return [node.id, ...path];
    }
    return null;
  };
  return within(root)?.join(":") ?? null;
}

/** The values of the node's widgets by name. */
export const values = (node) => Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.value]));

/** Whether an input's value comes from another node instead of its widget. */
export function isLinked(node, inputName) {
  const slot = slotOf(node, inputName);
  return slot >= 0 && node.isInputConnected(slot);
}

/** An input's index; -1 if there is none, or while the node is in no graph and so has no links. */
const slotOf = (node, inputName) => (node.graph && node.inputs?.findIndex(({ name }) => name === inputName)) ?? -1;

/** The node connected to an input, through reroutes; null if there is none. */
export function source(node, inputName) {
  let slot = slotOf(node, inputName);
  for (let hops = 0; slot >= 0 && hops < 100; hops++) {
    node = node.getInputNode(slot);
    if (node?.type !== "Reroute") return node ?? null;
    slot = 0;
  }
  return null;
}

/** Watches a node's values and links from now on, even after it is removed and added again. */
export function followNode(node, update) {
  const watcher = { node, update };
  if (node.graph) watchers.add(watcher);
  for (const widget of node.widgets ?? []) if (widget.serialize !== false) after(widget, "callback", changed);
  for (const event of ["onConfigure", "onConnectionsChange"]) after(node, event, changed);
  after(node, "onRemoved", () => watchers.delete(watcher));
  after(node, "onAdded", () => {
    watchers.add(watcher);
    update();
  });
  update();
}
