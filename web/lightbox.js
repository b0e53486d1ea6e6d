// Shows a picture as large as the window allows; arrow keys turn pages, Escape closes.
import { html, setText } from "./dom.js";
import { t } from "./texts.js";

/** `pages` are {source, title, caption}; opens the page with index `at`. `label`: of the dialog. */
export function showLarge(pages, at, label) {
  const picture = html("img"), title = html("strong"), caption = html("span");
  const turn = (by) => {
    at = Math.min(Math.max(at + by, 0), pages.length - 1);
    const page = pages[at];
    picture.src = page.source;
    picture.alt = page.caption || page.title;
    setText(title, page.title);
    setText(caption, page.caption);
    [before.disabled, after.disabled] = [at === 0, at === pages.length - 1];
  };
  const before = html("button", { class: "tlora-button", "aria-label": t("previous"), onclick: () => turn(-1) }, "‹");
  const after = html("button", { class: "tlora-button", "aria-label": t("next"), onclick: () => turn(1) }, "›");
  const close = html("button", { class: "tlora-button", "aria-label": t("close"), onclick: () => dialog.close() }, "×");
  const dialog = html("dialog", { class: "tlora tlora-large", "aria-label": label }, picture,
                      html("div", { class: "tlora-row" }, before, after, title, caption, close));
  dialog.addEventListener("keydown", (event) => {
    event.stopPropagation(); // the graph has its own shortcuts
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  turn(0);
  dialog.showModal();
}
