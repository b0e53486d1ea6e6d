// The training runs that the server keeps: fetched once, then followed by its events.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const MOST_POINTS = 2000; // of a curve; far more than a panel has pixels

const runs = new Map(); // oldest first
const watchers = new Set();

function tell() {
  for (const watcher of watchers) watcher();
}

/** Calls `watcher` at every change of a run or of the graph; returns a function that ends it. */
export function watch(watcher) {
  watchers.add(watcher);
  return () => watchers.delete(watcher);
}

/** The node that the host calls "3:7": number 7 in the sub-graph that node 3 stands for. */
function nodeOf(run) {
  let graph = app.rootGraph ?? app.graph;
  if (run.node == null || (run.workflow && graph.id && run.workflow !== graph.id)) return null;
  const ids = run.node.split(":");
  for (const id of ids.slice(0, -1)) graph = graph?.getNodeById(id)?.subgraph;
  return graph?.getNodeById(ids.at(-1)) ?? null;
}

/** The newest run of a node, or null. */
export const runOf = (node) => [...runs.values()].reverse().find((run) => nodeOf(run) === node) ?? null;

function take(state) {
  const known = runs.get(state.id);
  if (known) {
    if (state.sequence <= known.sequence) return;
    const last = known.points.at(-1)?.[0] ?? -Infinity;
    state.points = known.points.concat(state.points.filter(([step]) => step > last));
    // Every second one, and always the newest.
    if (state.points.length > MOST_POINTS) state.points = state.points.filter((_, i, all) => (all.length - 1 - i) % 2 === 0);
  } else {
    for (const [id, run] of runs) if (run.node === state.node && run.workflow === state.workflow) runs.delete(id);
  }
  runs.set(state.id, state);
}

let waiting = null; // events that came while the runs were being fetched

async function fetchAll() {
  waiting = [];
  const answer = await api.fetchApi("/tlora/runs").catch(() => null);
  if (answer?.ok) {
    const states = await answer.json();
    runs.clear();
    states.forEach(take);
  }
  waiting.forEach(take);
  waiting = null;
  tell();
}

/** Begins to follow the server; `ended(run)` is called when a run ends while this page looks on. */
export function follow(ended) {
  api.addEventListener("tlora.training", ({ detail }) => {
    if (waiting) return void waiting.push(detail);
    const was = runs.get(detail.id)?.state;
    take(detail);
    tell();
    if (was === "running" && detail.state !== "running") ended(detail);
  });
  // Events of the time between are lost; after a restart of the server, so are the runs.
  api.addEventListener("reconnected", fetchAll);
  return fetchAll();
}

/** The graph has changed: other nodes may be meant now. */
export const graphChanged = () => tell();

export const picturePath = (run, picture) => api.apiURL(`/tlora/runs/${run.id}/validation/${picture.index}`);

/** Asks the server for "stop" or "checkpoint". */
export const ask = (run, wish) => api.fetchApi(`/tlora/runs/${run.id}/${wish}`, { method: "POST" });
