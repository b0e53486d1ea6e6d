"""The interface's languages: every node and input has an entry in each, and no entry is left of removed ones."""

import json
import re

import pytest
from browser import load_workflow, new_page, open_interface, opened_browser
from browser import ours as ours_only
from hostlib.server import PACK_NAME
from places import REPO

LOCALES = REPO / "locales"
LANGUAGES = sorted(folder.name for folder in LOCALES.iterdir())


@pytest.fixture(scope="module")
def ours(server):
    return {
        name: info
        for name, info in server.object_info().items()
        if info["python_module"] == f"custom_nodes.{PACK_NAME}"
    }


def entries(language: str) -> dict:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def declared(info: dict) -> dict:
    return {
        name: spec[1] if len(spec) > 1 else {}
        for group in ("required", "optional")
        for name, spec in (info["input"].get(group) or {}).items()
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_has_an_entry_and_nothing_stale_is_left(ours, language):
    told = entries(language)
    assert told.keys() == ours.keys()
    for node, info in ours.items():
        assert told[node]["display_name"], node
        inputs = told[node].get("inputs", {})
        assert inputs.keys() == declared(info).keys(), node
        assert all(one["name"] for one in inputs.values()), node
        assert told[node].get("outputs", {}).keys() == {str(i) for i in range(len(info["output"]))}, node


def is_plain(text: str) -> bool:
    """Whether vue-i18n treats it as plain text. Other texts stop the older interfaces, at their start or later."""
    return not set(text) & set("{}|@")


def test_english_is_what_the_nodes_say_themselves(ours):
    """Texts that are not plain are left out; the interface then shows the node's own."""
    for node, info in ours.items():
        told = entries("en")[node]
        assert told["display_name"] == info["display_name"]
        assert told.get("description") == (info["description"] if is_plain(info["description"]) else None)
        for name, options in declared(info).items():
            assert told["inputs"][name]["name"] == (options.get("display_name") or name)
            assert told["inputs"][name].get("tooltip") == (
                options["tooltip"] if is_plain(options["tooltip"]) else None
            ), (node, name)


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_of_nodes_are_plain(language):
    for node, one in entries(language).items():
        texts = [
            one["display_name"],
            one.get("description", ""),
            *(text for slot in (*one.get("inputs", {}).values(), *one["outputs"].values()) for text in slot.values()),
        ]
        assert all(map(is_plain, texts)), node


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_translations_are_translated_and_keep_numbers_names_and_places(language):
    english, told = entries("en"), entries(language)
    for node in english:
        assert told[node]["description"], node
        for name, one in english[node].get("inputs", {}).items():
            other = told[node]["inputs"][name]
            if "tooltip" not in one:
                assert other["tooltip"], (node, name)
                continue
            assert other["tooltip"] != one["tooltip"], (node, name)
            # What is typed or computed with is the same in every language.
            for kept in re.findall(r"\d+(?:[.e]-?\d+)+|\b[a-z]+(?:_[a-z0-9]+)+\b", one["tooltip"]):
                assert kept in other["tooltip"], (node, name, kept)
    english, told = (
        json.loads((LOCALES / each / "main.json").read_text(encoding="utf-8"))["tlora"] for each in ("en", language)
    )
    assert english.keys() == told.keys()
    for key, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", told[key])), key


# Names that Chinese has no other word for, and what the host calls so too.
AS_IN_ENGLISH = {"CLIP", "VAE", "T-LoRA", "Sigmas", "Weights & Biases", "Min-SNR γ", "IS", "TS"}


def test_names_of_inputs_and_outputs_are_chinese_in_chinese():
    for node, one in entries("zh").items():
        names = [slot["name"] for slot in (*one.get("inputs", {}).values(), *one["outputs"].values())]
        assert [name for name in names if name not in AS_IN_ENGLISH and not re.search("[\u4e00-\u9fff]", name)] == [], (
            node
        )
        assert len(set(names[: len(one.get("inputs", {}))])) == len(one.get("inputs", {})), node


LABORATORY = ("tiny base", "could be told", "measurabl", "微型基础模型上", "内置小模型")


@pytest.mark.parametrize("language", LANGUAGES)
def test_tooltips_describe_inputs_and_no_measurements(language):
    for node, one in entries(language).items():
        for name, slot in one.get("inputs", {}).items():
            assert not any(word in slot.get("tooltip", "") for word in LABORATORY), (node, name)


def test_the_host_serves_both_languages(server):
    served = server.client.get_json("/i18n")
    assert all(
        served[language]["nodeDefs"]["TLoRATrainFromImage"] and served[language]["tlora"] for language in LANGUAGES
    )


def test_the_interface_in_chinese_speaks_chinese_on_the_nodes(server, chromium):
    with opened_browser(chromium) as browser:
        server.client.request("/settings/Comfy.Locale", "zh")
        try:
            page = new_page(browser)
            open_interface(page, server)
            load_workflow(
                page, json.loads((LOCALES.parent / "workflows" / "01 Quickstart.json").read_text(encoding="utf-8"))
            )
            page.get_by_role("button", name="停止并保留").wait_for()
            titles = page.evaluate(
                "() => [...document.querySelectorAll('.tlora-buttons button')].map(button => button.textContent)"
            )
            assert titles == ["停止并保留", "立即保存检查点", "更多设置"]
            assert page.evaluate("() => window.LiteGraph.registered_node_types.TLoRALoad.title") == "加载 T-LoRA"
            shown = page.evaluate("""() => window.app.graph.nodes.filter(node => node.type.startsWith("TLoRA"))
                .flatMap(({widgets, inputs, outputs}) => [...(widgets ?? []), ...inputs, ...outputs])
                .filter(({name}) => !name.startsWith("tlora_"))
                .map(({label, localized_name: translated, name}) => label ?? translated ?? name)""")
            assert [
                name for name in shown if name not in AS_IN_ENGLISH and not re.search("[\u4e00-\u9fff]", name)
            ] == []
            assert ours_only(page.complaints) == []
        finally:
            server.client.request("/settings/Comfy.Locale", "en")
