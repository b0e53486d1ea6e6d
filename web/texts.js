// The widgets' texts from locales/<language>/main.json; the host serves all languages at once.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const all = await api.fetchApi("/i18n").then((answer) => answer.json()).catch(() => ({}));
let words = null;

function chosen() {
  const language = app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en";
  return { ...all.en?.tlora, ...all[language]?.tlora };
}

/** The text of `key` in the interface's language, with {name} replaced by values.name. */
export function t(key, values = {}) {
  words ??= chosen();
  return (words[key] ?? key).replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}
