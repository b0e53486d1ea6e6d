// Ranks the pack's nodes in the interface's node search.
//
// The search also finds nodes by search_aliases, but ranks only by id and title, and then by use: for "concept" or
// "lora", everything that resembles the word would come before the nodes that are meant.
const FIRST = ["TLoRATrainFromImage", "TLoRALoad", "TLoRAApply"];
const AT_START = 1, WITHIN = 3; // the search's match classes: the text begins with the query; contains it
// Use count of our nodes: above nodes that only resemble the word, below popular ones.
const USES = 400;
const OURS = /t-?lora/i;

/** Whether the query begins inside the pack's name in `text`. `middle`: its position plus half of the text's length. */
function isOurs(text, middle, length) {
  const found = OURS.exec(text), from = middle - length / 2 - found?.index;
  return length === text.length && from >= 0 && from < found[0].length;
}

/** The search's hook of a node: returns its scores [class, middle, length, ...]; lower scores come first. */
function scoresOfFirst(scores) {
  const [match, middle, length] = scores;
  const better = match > AT_START && match <= WITHIN && [this.display_name, this.name].some((text) => isOurs(text, middle, length));
  return [better ? AT_START : match, FIRST.indexOf(this.name) - USES, ...scores.slice(1)];
}

/** The pack's other titles and ids contain its name too, and must not come before the first nodes. */
const scoresOfOthers = ([match, ...rest]) => [match === AT_START ? WITHIN : match, 0, ...rest];

/** Sets the ranks of the pack's nodes; `definitions` holds all nodes by id, before the interface registers them. */
export function rankNodes(definitions) {
  for (const [name, definition] of Object.entries(definitions)) {
    if (FIRST.includes(name)) definition.postProcessSearchScores = scoresOfFirst;
    else if (/^TLoRA[A-Z]/.test(name)) definition.postProcessSearchScores = scoresOfOthers;
  }
}
