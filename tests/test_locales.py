"""The interface's languages: every node and input has its entry in each, and none is left of what is gone."""
import json
import re
from pathlib import Path

import pytest
from hostlib.server import PACK_NAME

LOCALES = Path(__file__).resolve().parents[1] / "locales"
LANGUAGES = sorted(folder.name for folder in LOCALES.iterdir())


@pytest.fixture(scope="module")
def ours(server):
    return {name: info for name, info in server.object_info().items() if info["python_module"] == f"custom_nodes.{PACK_NAME}"}


def entries(language: str) -> dict:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def declared(info: dict) -> dict:
    return {name: spec[1] if len(spec) > 1 else {} for group in ("required", "optional")
            for name, spec in (info["input"].get(group) or {}).items()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_has_an_entry_and_nothing_stale_is_left(ours, language):
    told = entries(language)
    assert told.keys() == ours.keys()
    for node, info in ours.items():
        assert told[node]["display_name"] and told[node]["description"], node
        inputs = told[node].get("inputs", {})
        assert inputs.keys() == declared(info).keys(), node
        assert all(one["name"] and one["tooltip"] for one in inputs.values()), node
        assert told[node].get("outputs", {}).keys() == {str(i) for i in range(len(info["output"]))}, node


def test_english_is_what_the_nodes_say_themselves(ours):
    for node, info in ours.items():
        told = entries("en")[node]
        assert (told["display_name"], told["description"]) == (info["display_name"], info["description"])
        for name, options in declared(info).items():
            assert told["inputs"][name] == {"name": options.get("display_name") or name, "tooltip": options["tooltip"]}, (node, name)


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_translations_are_translated_and_keep_numbers_names_and_places(language):
    english, told = entries("en"), entries(language)
    for node in english:
        for name, one in english[node].get("inputs", {}).items():
            other = told[node]["inputs"][name]
            assert other["tooltip"] != one["tooltip"], (node, name)
            # What is typed or computed with is the same in every language.
            for kept in re.findall(r"\{[a-z_]*\}|\d+(?:[.e]-?\d+)+|\b[a-z]+(?:_[a-z0-9]+)+\b", one["tooltip"]):
                assert kept in other["tooltip"], (node, name, kept)
    english, told = (json.loads((LOCALES / each / "main.json").read_text(encoding="utf-8"))["tlora"] for each in ("en", language))
    assert english.keys() == told.keys()
    for key, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", told[key])), key


def test_the_host_serves_both_languages(server):
    served = server.client.get_json("/i18n")
    assert all(served[language]["nodeDefs"]["TLoRATrainFromImage"] and served[language]["tlora"] for language in LANGUAGES)
