// Where the interface's node search puts the pack's nodes.
//
// The search finds a node by its search_aliases too, but ranks by id and title alone, and then by how much a node is used: whoever
// types "concept" or "lora" would get all that resembles the word before the nodes that are meant.
const FIRST = ["TLoRATrainFromImage", "TLoRALoad", "TLoRAApply"];
const AT_START = 1, WITHIN = 3; // the search's classes of matches: a text begins with what was typed; it has it somewhere
// Times that a node counts as used: more than those that merely resemble a word, less than what everybody uses.
const USES = 400;
const OURS = /t-?lora/i;

/** Whether what was typed begins inside the pack's name in `text`. `middle`: its place there and half of the text's length. */
function isOurs(text, middle, length) {
  const found = OURS.exec(text), from = middle - length / 2 - found?.index;
  return length === text.length && from >= 0 && from < found[0].length;
}

/** The search's own hook of a node: its scores, [class, middle, length, ...], the lower the earlier, as they are to count. */
function scoresOfFirst(scores) {
  const [match, middle, length] = scores;
  const better = match > AT_START && match <= WITHIN && [this.display_name, this.name].some((text) => isOurs(text, middle, length));
  return [better ? AT_START : match, FIRST.indexOf(this.name) - USES, ...scores.slice(1)];
}

/** All other titles and ids of the pack begin with its name or have it: none of them comes before the first. */
const scoresOfOthers = ([match, ...rest]) => [match === AT_START ? WITHIN : match, 0, ...rest];

/** Gives the pack's nodes their place; `definitions` are all nodes', by id, before the interface has registered them. */
export function rankNodes(definitions) {
  for (const [name, definition] of Object.entries(definitions)) {
    if (FIRST.includes(name)) definition.postProcessSearchScores = scoresOfFirst;
    else if (/^TLoRA[A-Z]/.test(name)) definition.postProcessSearchScores = scoresOfOthers;
  }
}
