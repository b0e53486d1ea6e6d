// Puts the pack's panels on its nodes.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { nameBoxes } from "./boxes.js";
import { html } from "./dom.js";
import { forgetCards, refreshFor } from "./files.js";
import { changed, forgetClosed, nodeAt } from "./graph.js";
import { mendLinks } from "./help.js";
import { keepOwnValues } from "./own_values.js";
import { TrainingPanel } from "./panel.js";
import { addPictures, forgetPictures, picturesRan } from "./pictures.js";
import { followRefusals } from "./refusals.js";
import { follow, remembered } from "./runs.js";
import { addSchedule, followSampling } from "./schedules.js";
import { rankNodes } from "./search.js";
import { orderTemplates } from "./templates.js";

const TRAIN = "TLoRATrainFromImage", IMAGES = "TLoRAImages";
const SCHEDULED = [TRAIN, "TLoRALoad", "TLoRAApply"];

document.head.append(html("link", { rel: "stylesheet", href: new URL("tlora.css", import.meta.url).href }));

mendLinks();
orderTemplates();

app.registerExtension({
  name: "ComfyUI-T-LoRA",
  addCustomNodeDefs: rankNodes,
  setup() {
    followSampling();
    followRefusals();
    // Nodes that write files report their names; a stopped training reports it when it ends.
    api.addEventListener("executed", ({ detail }) => {
      const names = detail.output?.tlora_names ?? [], node = nodeAt(detail);
      if (node?.comfyClass === IMAGES && detail.output?.tlora_pictures) picturesRan(node, detail.output);
      if (node?.comfyClass === TRAIN && names.length) remembered(node, names[0]);
      return refreshFor(names);
    });
    return follow((run) => run.file && refreshFor([run.file]));
  },
  afterConfigureGraph() {
    forgetClosed();
    forgetCards();
    forgetPictures();
    changed();
  },
  refreshComboInNodes() {
    forgetCards();
    forgetPictures();
    changed();
  },
  nodeCreated(node) {
    const isOurs = /^TLoRA[A-Z]/.test(node.comfyClass);
    if (isOurs) keepOwnValues(node);
    if (SCHEDULED.includes(node.comfyClass)) addSchedule(node);
    if (node.comfyClass === TRAIN) new TrainingPanel(node);
    if (node.comfyClass === IMAGES) addPictures(node);
    if (isOurs) nameBoxes(node);
  },
});
