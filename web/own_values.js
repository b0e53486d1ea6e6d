// Protects a new node's values.
import { after, values } from "./graph.js";

/** The interface stores values by graph, node id and widget name. After Clear Workflow it gives them to a new node with
 * the same id, even of another type. Call this when a node is created: the values that it has before it is added to a
 * graph (its defaults or its configuration) are restored there. */
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
