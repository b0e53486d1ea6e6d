// Puts the pack's panels on its nodes.
import { app } from "../../scripts/app.js";
import { addPanel, html } from "./dom.js";
import { IDLE_HEIGHT, TrainingPanel } from "./panel.js";
import { follow, graphChanged } from "./runs.js";

document.head.append(html("link", { rel: "stylesheet", href: new URL("tlora.css", import.meta.url).href }));

/** Calls `f` after the node's own `method`. */
function after(node, method, f) {
  const own = node[method];
  node[method] = function (...args) {
    const result = own?.apply(this, args);
    f();
    return result;
  };
}

function addTrainingPanel(node) {
  const panel = new TrainingPanel(node);
  panel.resize = addPanel(node, "tlora_training", panel.element, IDLE_HEIGHT);
  let unfollow = panel.follow();
  // A node that leaves may come back: the interface moves nodes into sub-graphs and out of them.
  after(node, "onRemoved", () => unfollow());
  after(node, "onAdded", () => {
    unfollow();
    unfollow = panel.follow();
  });
}

app.registerExtension({
  name: "ComfyUI-T-LoRA",
  setup: () => follow(() => {}),
  afterConfigureGraph: graphChanged,
  nodeCreated(node) {
    if (node.comfyClass === "TLoRATrainFromImage") addTrainingPanel(node);
  },
});
