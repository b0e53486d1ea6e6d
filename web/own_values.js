// A new node's values are its own.
import { after, values } from "./graph.js";

/** The interface keeps values by graph, node id and widget name, and after Clear Workflow hands them to a new node of that id, so that
 * one node type would get the value of an input of another type with that name. Called when a node is made: what it holds until it
 * is first in a graph, its defaults or what it was configured with, is what it holds there. */
export function keepOwnValues(node) {
  let own = values(node);
  after(node, "onConfigure", () => { own &&= values(node); });
  after(node, "onAdded", () => {
    for (const widget of node.widgets ?? []) {
      if (own && widget.name in own && widget.value !== own[widget.name]) widget.value = own[widget.name];
    }
    own = null;
  });
}
