// The training runs that the server keeps: fetched once, then updated by its events.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { changed, nodeAt, pathOf } from "./graph.js";

const MOST_POINTS = 2000; // of a curve; far more than a panel's pixels

const runs = new Map(); // oldest first

const OWNER = "tlora_run"; // the node property that identifies its runs; see hosts/comfy/page/queued.py

const isOf = (run, node) => Boolean(run.owner) && run.owner === node.properties?.[OWNER] && nodeAt({ node: run.node }) === node;

/** The newest run of a node, or null. Node ids do not suffice: they are the same each time a template is opened. */
export const runOf = (node) => [...runs.values()].reverse().find((run) => isOf(run, node)) ?? null;

/**
 * Call before the graph is queued: marks the node, and its runs carry the mark. The mark is saved with the graph, so a
 * reopened graph finds its runs. A copy of the node or graph finds them too, until it runs and gets its own mark.
 */
export function mark(node) {
  const place = `@${(app.rootGraph ?? app.graph).id}/${node.id}`;
  if (node.properties[OWNER]?.endsWith(place)) return;
  const random = crypto.getRandomValues(new Uint32Array(4)); // randomUUID is not available over plain http
  node.properties[OWNER] = [...random].map((part) => part.toString(16)).join("-") + place;
}

/** A state of a node that no server run reports; it stays until one does. */
function tell(node, state) {
  const owner = node.properties?.[OWNER];
  const empty = { sequence: 0, step: 0, steps: 0, points: [], pictures: [], scores: null, wishes: [], message: "", file: "" };
  const place = { owner, node: pathOf(node), workflow: (app.rootGraph ?? app.graph).id };
  runs.delete(owner);
  runs.set(owner, { ...empty, ...place, id: owner, isLocal: true, ...state });
  changed();
}

/** A training whose result the host took from its cache. */
export function remembered(node, file) {
  const run = runOf(node);
  if (node.properties?.[OWNER] && (!run || run.isLocal)) tell(node, { state: "found", file });
}

/** A training that the server did not start, and why. */
export const refused = (node, message) => node.comfyClass === "TLoRATrainFromImage" && tell(node, { state: "failed", message });

function take(state) {
  const known = runs.get(state.id);
  if (known) {
    if (state.sequence <= known.sequence) return;
    const last = known.points.at(-1)?.[0] ?? -Infinity;
    state.points = known.points.concat(state.points.filter(([step]) => step > last));
    // Keep every second one, and always the newest.
    if (state.points.length > MOST_POINTS) state.points = state.points.filter((_, i, all) => (all.length - 1 - i) % 2 === 0);
  } else {
    for (const [id, run] of runs) if (run.node === state.node && run.workflow === state.workflow && run.owner === state.owner) runs.delete(id);
  }
  runs.set(state.id, state);
}

let waiting = null; // events that arrive while the runs are fetched
let socket = null; // the socket on which the server was asked to send events to this page

let fetching = Promise.resolve();
const fetchAll = () => (fetching = fetching.then(fetchRuns)); // one after the other, because they share `waiting`

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

/** Starts to follow the server; calls `ended(run)` when a run ends while this page is open. */
export function follow(ended) {
  api.addEventListener("tlora.training", ({ detail }) => {
    if (waiting) return void waiting.push(detail);
    const was = runs.get(detail.id)?.state;
    take(detail);
    changed();
    if (was === "running" && detail.state !== "running") ended(detail);
  });
  // Events in between are lost; after a restart of the server, so are the runs.
  api.addEventListener("reconnected", fetchAll);
  // The first message on a socket: on a new socket the server does not send this page events until asked.
  api.addEventListener("status", () => isOpen() && api.socket !== socket && fetchAll());
  return fetchAll();
}

export const picturePath = (run, picture) => api.apiURL(`/tlora/runs/${run.id}/validation/${picture.index}`);

/** Asks the server for "stop" or "checkpoint". True if it accepted, or if the run has just ended (409). */
export const ask = (run, wish) =>
  api.fetchApi(`/tlora/runs/${run.id}/${wish}`, { method: "POST" }).then((answer) => answer.ok || answer.status === 409, () => false);
