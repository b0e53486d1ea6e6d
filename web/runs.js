// The training runs that the server keeps: fetched once, then followed by its events.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { changed, nodeAt, pathOf } from "./graph.js";

const MOST_POINTS = 2000; // of a curve; far more than a panel has pixels

const runs = new Map(); // oldest first

const OWNER = "tlora_run"; // the property by which a node knows its runs; see hosts/comfy/page/queued.py

const isOf = (run, node) => Boolean(run.owner) && run.owner === node.properties?.[OWNER] && nodeAt({ node: run.node }) === node;

/** The newest run of a node, or null. Ids do not tell whose it is: they are the same whenever a template is opened. */
export const runOf = (node) => [...runs.values()].reverse().find((run) => isOf(run, node)) ?? null;

/**
 * Before the graph is queued: the node gets a mark that its runs carry. It is saved with the graph, so that a graph that is opened
 * again finds its runs; a copy of the node or of the graph finds them too, until it is run itself and gets a mark of its own.
 */
export function mark(node) {
  const place = `@${(app.rootGraph ?? app.graph).id}/${node.id}`;
  if (node.properties[OWNER]?.endsWith(place)) return;
  const random = crypto.getRandomValues(new Uint32Array(4)); // and not randomUUID, which plain http may not use
  node.properties[OWNER] = [...random].map((part) => part.toString(16)).join("-") + place;
}

/** What no run of the server's tells of a node; it stands until one does. */
function tell(node, state) {
  const owner = node.properties?.[OWNER];
  const empty = { sequence: 0, step: 0, steps: 0, points: [], pictures: [], wishes: [], message: "", file: "" };
  const place = { owner, node: pathOf(node), workflow: (app.rootGraph ?? app.graph).id };
  runs.delete(owner);
  runs.set(owner, { ...empty, ...place, id: owner, isLocal: true, ...state });
  changed();
}

/** A training that the host answered from its memory. */
export function remembered(node, file) {
  const run = runOf(node);
  if (node.properties?.[OWNER] && (!run || run.isLocal)) tell(node, { state: "found", file });
}

/** A training that the server did not begin, and why. */
export const refused = (node, message) => node.comfyClass === "TLoRATrainFromImage" && tell(node, { state: "failed", message });

function take(state) {
  const known = runs.get(state.id);
  if (known) {
    if (state.sequence <= known.sequence) return;
    const last = known.points.at(-1)?.[0] ?? -Infinity;
    state.points = known.points.concat(state.points.filter(([step]) => step > last));
    // Every second one, and always the newest.
    if (state.points.length > MOST_POINTS) state.points = state.points.filter((_, i, all) => (all.length - 1 - i) % 2 === 0);
  } else {
    for (const [id, run] of runs) if (run.node === state.node && run.workflow === state.workflow && run.owner === state.owner) runs.delete(id);
  }
  runs.set(state.id, state);
}

let waiting = null; // events that came while the runs were being fetched
let socket = null; // through which the server sends its events to this page, once it has been asked to

let fetching = Promise.resolve();
const fetchAll = () => (fetching = fetching.then(fetchRuns)); // one after the other, for the sake of what waits

async function fetchRuns() {
  waiting = [];
  if (isOpen()) ({ socket } = api);
  const answer = await api.fetchApi(`/tlora/runs?client=${encodeURIComponent(api.clientId ?? "")}`).catch(() => null);
  if (answer?.ok) {
    const states = await answer.json();
    runs.clear();
    states.forEach(take);
  }
  waiting.forEach(take);
  waiting = null;
  changed();
}

const isOpen = () => Boolean(api.clientId) && api.socket?.readyState === WebSocket.OPEN;

/** Begins to follow the server; `ended(run)` is called when a run ends while this page looks on. */
export function follow(ended) {
  api.addEventListener("tlora.training", ({ detail }) => {
    if (waiting) return void waiting.push(detail);
    const was = runs.get(detail.id)?.state;
    take(detail);
    changed();
    if (was === "running" && detail.state !== "running") ended(detail);
  });
  // Events of the time between are lost; after a restart of the server, so are the runs.
  api.addEventListener("reconnected", fetchAll);
  // The first that the server says through a socket: with another one it takes the page for one that cannot listen yet.
  api.addEventListener("status", () => isOpen() && api.socket !== socket && fetchAll());
  return fetchAll();
}

export const picturePath = (run, picture) => api.apiURL(`/tlora/runs/${run.id}/validation/${picture.index}`);

/** Asks the server for "stop" or "checkpoint"; whether it has heard. A run that has just ended (409) needs neither. */
export const ask = (run, wish) =>
  api.fetchApi(`/tlora/runs/${run.id}/${wish}`, { method: "POST" }).then((answer) => answer.ok || answer.status === 409, () => false);
