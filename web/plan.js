// Shows the values behind the Train node's defaults (0 and auto), which the server computes before the run.
import { api } from "../../scripts/api.js";
import { isLinked, source, values } from "./graph.js";
import { t } from "./texts.js";

const LOADERS = { CheckpointLoaderSimple: "ckpt_name", UNETLoader: "unet_name", TLoRATinyBaseModel: null };
const INPUTS = ["token", "class_word", "method", "rank", "min_rank", "alpha", "curve", "start", "resolution", "layers", "steps", "learning_rate",
                "batch_size", "seed"];

const answers = new Map(); // request -> promise

/** The node that loads the connected model, through nodes that change it; null if it is unknown. */
function loaderOf(node) {
  for (let hops = 0; node && hops < 30; hops++) {
    node = source(node, "model");
    if (node && node.type in LOADERS) return node;
  }
  return null;
}

function asked(node) {
  const loader = loaderOf(node), file = loader && LOADERS[loader.type];
  if (!loader || (file && isLinked(loader, file)) || INPUTS.some((name) => isLinked(node, name))) return null;
  const options = source(node, "options"), all = values(node);
  const optimizer = options ? values(options).optimizer : "auto";
  if (!optimizer || INPUTS.some((name) => all[name] === undefined)) return null;
  const own = Object.fromEntries(INPUTS.map((name) => [name, all[name]]));
  // A list without a selection has no value.
  return JSON.stringify({ ...own, optimizer, loader: loader.type, file: (file && values(loader)[file]) ?? "" });
}

function ask(body) {
  if (!answers.has(body)) {
    const request = { method: "POST", body, headers: { "Content-Type": "application/json" } };
    answers.set(body, api.fetchApi("/tlora/plan", request).then((answer) => (answer.ok ? answer.json() : {})).catch(() => ({})));
    if (answers.size > 50) answers.delete(answers.keys().next().value);
  }
  return answers.get(body);
}

/** Whether all weights have to be on the device: memory "auto" and "lowest" leave in RAM those that do not fit. */
const isWhole = (node) => ["fast", "low"].includes(values(node).memory);

/** {text, isWrong} of the memory of weights, adapters and optimizer state, which is certain; the rest of a step is only
 * known when it runs. */
function memoryOf({ least_bytes: least, streamable_bytes: streamable, device_bytes: there }, isWhole) {
  const gib = (bytes) => Number((bytes / 2 ** 30).toPrecision(2));
  const isWrong = (isWhole ? least : least - streamable) > there;
  const key = least <= there ? "plan_memory" : isWrong ? "plan_too_large" : "plan_streamed";
  return { text: t(key, { least: gib(least), there: gib(there), weights: gib(streamable) }), isWrong };
}

const rate = ({ optimizer, learning_rate }) => (optimizer === "prodigy" ? t("plan_prodigy")
  : t("plan_rate", { rate: Number(learning_rate.toPrecision(3)).toExponential() }));

function guided({ scale, told, told_in_training: inTraining }) {
  if (told !== null) return t("plan_told", { told, inTraining });
  return scale === 1 ? t("plan_unguided") : t("plan_guided", { scale });
}

/** The side of the square that a Train node trains on, in pixels; a usual one while the model is not known. */
export async function resolutionOf(node) {
  const body = asked(node), plan = body ? await ask(body) : {};
  return plan.resolution ?? (values(node).resolution || 1024);
}

/** {text, isWrong} for the panel's line. */
export async function planOf(node) {
  const body = asked(node), plan = body ? await ask(body) : {};
  if (plan.wrong) return { text: plan.wrong, isWrong: true };
  if (!plan.steps) return { text: t("plan_unknown"), isWrong: false };
  const { steps, resolution, method, rank, min_rank, layers, guidance } = plan, memory = memoryOf(plan, isWhole(node));
  return { text: [t("steps", { steps }), rate(plan), `${resolution} px`, `${method} ${rank === min_rank ? rank : `${rank}/${min_rank}`}`,
                  guided(guidance), t("plan_layers", { layers }), memory.text].join(", "), isWrong: memory.isWrong };
}
