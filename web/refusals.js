// For prompts that the server refuses to run: shows our sentence in the panel and marks only the inputs that it names.
import { api } from "../../scripts/api.js";
import { nodeAt } from "./graph.js";
import { refused } from "./runs.js";

const KIND = "custom_validation_failed"; // a node's own check; the host reports it for each input that was checked

/** The sentence in such an error, whose details are "input - sentence". */
const sentenceOf = ({ details }) => details.slice(details.indexOf(" - ") + 3);

/** Whether a sentence names an input outside the user's own text. */
const names = (sentence, input) => new RegExp(`\\b${input}\\b`).test(sentence.replace(/"[^"]*"/g, ""));

function look(nodeErrors) {
  for (const [id, found] of Object.entries(nodeErrors ?? {})) {
    const own = found.class_type?.startsWith("TLoRA") ? found.errors.filter(({ type, details }) => type === KIND && details) : [];
    if (!own.length) continue;
    const named = own.filter((error) => names(sentenceOf(error), error.extra_info.input_name));
    const marked = named.length ? named : own.slice(0, 1);
    found.errors = found.errors.filter((error) => !own.includes(error) || marked.includes(error));
    const node = nodeAt({ node: id });
    if (node) refused(node, sentenceOf(own[0]));
  }
}

/** Starts to inspect the server's answers before the page shows them. */
export function followRefusals() {
  const own = api.queuePrompt;
  api.queuePrompt = async function (...args) {
    try {
      const answer = await own.apply(this, args);
      look(answer?.node_errors);
      return answer;
    } catch (error) {
      look(error?.response?.node_errors);
      throw error;
    }
  };
}
