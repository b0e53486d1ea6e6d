// Sorts the pack's templates in the template browser.
import { api } from "../../scripts/api.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));

/** By name, because names are numbered; the host lists files in the disk's order. */
export function orderTemplates() {
  const listed = api.getWorkflowTemplates;
  api.getWorkflowTemplates = async function (...args) {
    const names = await listed.apply(this, args);
    names[PACK]?.sort();
    return names;
  };
}
