// Shows a picture as large as the window allows; arrow keys turn pages, Escape closes.
import { html, setText } from "./dom.js";
import { t } from "./texts.js";

/** A button with a sign instead of a text. */
export const signButton = (sign, name, onclick) => html("button", { class: "tlora-button", "aria-label": t(name), title: t(name), onclick }, sign);

/** Opens a dialog over the page; `press(event)` is told of keys. Returns the dialog, which Escape or a click beside it closes. */
export function openDialog(label, press, ...children) {
  const dialog = html("dialog", { class: "tlora tlora-large", "aria-label": label }, ...children);
  dialog.addEventListener("keydown", (event) => {
    event.stopPropagation(); // the graph has its own shortcuts
    press(event);
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

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
  const before = signButton("‹", "previous", () => turn(-1)), after = signButton("›", "next", () => turn(1));
  const close = signButton("×", "close", () => dialog.close());
  turn(0);
  const dialog = openDialog(label, ({ key }) => turn({ ArrowLeft: -1, ArrowRight: 1 }[key] ?? 0), picture,
                            html("div", { class: "tlora-row" }, before, after, title, caption, close));
}
