// The server's description of a file in the loras folders: schedule, phrase, thumbnail.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const cards = new Map(); // name -> promise

/** The card of the file chosen on a Load node, or null if there is none. */
export function cardOf(node) {
  const { value: name, options } = node.widgets.find((widget) => widget.name === "file");
  const choices = typeof options.values === "function" ? options.values() : options.values;
  if (!choices?.includes(name)) return null;
  if (!cards.has(name)) {
    cards.set(name, api.fetchApi(`/tlora/files?name=${encodeURIComponent(name)}`)
      .then((answer) => (answer.ok ? answer.json() : null)).catch(() => null));
  }
  return cards.get(name);
}

export const thumbnailPath = (name) => api.apiURL(`/tlora/thumbnail?name=${encodeURIComponent(name)}`);

const listed = () => {
  const definition = LiteGraph.registered_node_types.TLoRALoad?.nodeData;
  const [kind, options] = definition?.input?.required?.file ?? [];
  return Array.isArray(kind) ? kind : options?.options ?? [];
};

let looking = Promise.resolve();

/** Adds new files to all lists of the page, as Refresh does, if possible without its messages. */
export function refreshFor(names) {
  // One after the other, because an earlier refresh may have found the files already.
  const look = async () => {
    const known = listed();
    if (names.every((name) => known.includes(name))) return;
    await (app.reloadNodeDefs ?? app.refreshComboInNodes).call(app);
  };
  looking = looking.catch(() => {}).then(look);
  return looking;
}

/** Call after a refresh or when a graph is loaded, because files may have been replaced. */
export const forgetCards = () => cards.clear();
