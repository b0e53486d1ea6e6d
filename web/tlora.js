// Puts the pack's panels on its nodes.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { html } from "./dom.js";
import { forgetCards, refreshFor } from "./files.js";
import { changed, forgetClosed } from "./graph.js";
import { keepOwnValues } from "./own_values.js";
import { TrainingPanel } from "./panel.js";
import { follow } from "./runs.js";
import { addSchedule, followSampling } from "./schedules.js";

const SCHEDULED = ["TLoRATrainFromImage", "TLoRALoad", "TLoRAApply"];

document.head.append(html("link", { rel: "stylesheet", href: new URL("tlora.css", import.meta.url).href }));

app.registerExtension({
  name: "ComfyUI-T-LoRA",
  setup() {
    followSampling();
    // Nodes that write files tell their names; a training that was stopped tells it when it ends.
    api.addEventListener("executed", ({ detail }) => refreshFor(detail.output?.tlora_names ?? []));
    return follow((run) => run.file && refreshFor([run.file]));
  },
  afterConfigureGraph() {
    forgetClosed();
    forgetCards();
    changed();
  },
  refreshComboInNodes() {
    forgetCards();
    changed();
  },
  nodeCreated(node) {
    if (node.comfyClass?.startsWith("TLoRA")) keepOwnValues(node);
    if (SCHEDULED.includes(node.comfyClass)) addSchedule(node);
    if (node.comfyClass === "TLoRATrainFromImage") new TrainingPanel(node);
  },
});
