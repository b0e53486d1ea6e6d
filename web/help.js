// Help pages link to further pages under the pack's usual path.
const PLACE = "/extensions/ComfyUI-T-LoRA/docs/";

/** Redirects such links to the path from which the pack is really served. */
export function mendLinks() {
  document.addEventListener("click", ({ target }) => {
    const link = target.closest?.(`a[href^="${PLACE}"]`);
    if (link) link.href = new URL(`docs/${link.getAttribute("href").slice(PLACE.length)}`, import.meta.url).href;
  }, true);
}
