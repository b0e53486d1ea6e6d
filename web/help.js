// Help pages link to further pages of the pack by its usual place.
const PLACE = "/extensions/ComfyUI-T-LoRA/docs/";

/** Points such links to where the pack is really served from. */
export function mendLinks() {
  document.addEventListener("click", ({ target }) => {
    const link = target.closest?.(`a[href^="${PLACE}"]`);
    if (link) link.href = new URL(`docs/${link.getAttribute("href").slice(PLACE.length)}`, import.meta.url).href;
  }, true);
}
