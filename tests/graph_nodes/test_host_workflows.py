"""tools/host.py: workflows in the interface's format, --set, and the command line."""

import sys

import pytest
from hostlib import chromium, cli, commands
from hostlib.errors import HostError
from hostlib.graph import to_prompt
from hostlib.overrides import apply_overrides, parse_sets
from hostlib.server import load_workflow
from places import TESTS


def image_in(name="image"):
    return {name: ["IMAGE", {}]}


INFO = {
    "Source": {"input": {"required": {"seed": ["INT", {"default": 0}], "text": ["STRING", {"default": "none"}]}}},
    "Filter": {"input": {"required": {**image_in(), "amount": ["FLOAT", {"default": 0.5}]}}},
    "Save": {
        "input": {
            "required": {**image_in("images"), "prefix": ["STRING", {}]},
            "optional": {"quality": ["INT", {"default": 9}]},
        }
    },
    "Upload": {
        "input": {"required": {"image": [["a.png"], {"image_upload": True}]}, "optional": {"scale": ["FLOAT", {}]}}
    },
    "Choice": {
        "input": {
            "required": {
                "mode": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "plain", "inputs": {"required": {}}},
                            {"key": "sized", "inputs": {"required": {"width": ["INT", {"default": 8}], **image_in()}}},
                        ]
                    },
                ],
                "last": ["BOOLEAN", {}],
            }
        }
    },
    "Many": {"input": {"required": {"names": ["COMBO", {"multiselect": True, "options": ["a", "b"]}]}}},
}


def node(node_id, kind, values=(), inputs=(), outputs=("IMAGE",), **more):
    slots = [{"name": name, "type": kind_of, "link": link} for name, kind_of, link in inputs]
    outs = [{"name": out, "type": out} for out in outputs]
    return {"id": node_id, "type": kind, "widgets_values": values, "inputs": slots, "outputs": outs, **more}


def convert(nodes, links=(), **more):
    return to_prompt({"nodes": list(nodes), "links": list(links), **more}, INFO)


SOURCE = node(1, "Source", [7, "randomize", "hello"])


def chain(middle, link_type="IMAGE"):
    """Source -> middle -> Save."""
    save = node(3, "Save", ["p", 5], [("images", "IMAGE", 11)])
    return convert([SOURCE, middle, save], [[10, 1, 0, 2, 0, link_type], [11, 2, 0, 3, 0, link_type]])


def test_control_after_generate_is_not_an_input():
    assert convert([SOURCE])["1"]["inputs"] == {"seed": 7, "text": "hello"}
    assert convert([node(1, "Source", [7, "hello"])])["1"]["inputs"] == {"seed": 7, "text": "hello"}


def test_values_may_be_saved_by_name():
    assert convert([node(1, "Source", {"text": "t", "seed": 3})])["1"]["inputs"] == {"seed": 3, "text": "t"}


def test_values_missing_from_an_older_file_are_defaults():
    assert convert([node(1, "Source", [])])["1"]["inputs"] == {"seed": 0, "text": "none"}


def test_link_into_a_converted_widget_wins_over_its_value():
    linked = node(2, "Source", [1, "fixed", "unused"], [("text", "STRING", 10)])
    linked["inputs"][0]["widget"] = {"name": "text"}
    prompt = convert([SOURCE, linked], [[10, 1, 0, 2, 0, "STRING"]])
    assert prompt["2"]["inputs"] == {"seed": 1, "text": ["1", 0]}


def test_reroute_disappears():
    prompt = chain(node(2, "Reroute", inputs=[("", "*", 10)]))
    assert set(prompt) == {"1", "3"} and prompt["3"]["inputs"]["images"] == ["1", 0]


def test_primitive_becomes_its_value():
    prompt = convert(
        [node(1, "PrimitiveNode", [42, "fixed"]), node(2, "Source", [0, "fixed", "x"], [("seed", "INT", 10)])],
        [[10, 1, 0, 2, 0, "INT"]],
    )
    assert prompt == {"2": {"class_type": "Source", "inputs": {"seed": 42, "text": "x"}, "_meta": {"title": "Source"}}}


def test_notes_are_left_out():
    assert set(convert([SOURCE, node(8, "Note", ["n"]), node(9, "MarkdownNote", ["n"])])) == {"1"}


def test_bypassed_node_hands_its_input_on():
    prompt = chain(node(2, "Filter", [0.1], [("image", "IMAGE", 10)], mode=4))
    assert set(prompt) == {"1", "3"} and prompt["3"]["inputs"]["images"] == ["1", 0]


def test_bypassed_node_without_a_fitting_input_hands_on_nothing():
    assert "images" not in chain(node(2, "Filter", [0.1], [("mask", "MASK", 10)], mode=4))["3"]["inputs"]


def test_muted_node_takes_its_links_along():
    prompt = chain(node(2, "Filter", [0.1], [("image", "IMAGE", 10)], mode=2))
    assert set(prompt) == {"1", "3"} and prompt["3"]["inputs"] == {"prefix": "p", "quality": 5}


def test_upload_button_is_skipped():
    assert convert([node(1, "Upload", ["a.png", "image", 2.0])])["1"]["inputs"] == {"image": "a.png", "scale": 2.0}
    assert convert([node(1, "Upload", ["a.png"])])["1"]["inputs"] == {"image": "a.png"}


def test_dynamic_combo_brings_the_inputs_of_its_choice():
    assert convert([node(1, "Choice", ["plain", True])])["1"]["inputs"] == {"mode": "plain", "last": True}
    linked = node(2, "Choice", ["sized", 64, False], [("mode.image", "IMAGE", 10)])
    inputs = convert([SOURCE, linked], [[10, 1, 0, 2, 0, "IMAGE"]])["2"]["inputs"]
    assert inputs == {"mode": "sized", "mode.width": 64, "mode.image": ["1", 0], "last": False}


def test_list_value_is_wrapped_so_that_it_is_not_taken_for_a_link():
    assert convert([node(1, "Many", [["a", "b"]])])["1"]["inputs"] == {"names": {"__value__": ["a", "b"]}}


def link(link_id, origin, origin_slot, target, target_slot):
    return {
        "id": link_id,
        "origin_id": origin,
        "origin_slot": origin_slot,
        "target_id": target,
        "target_slot": target_slot,
        "type": "IMAGE",
    }


def subgraph_workflow(**instance):
    """Source -> [Filter inside a subgraph] -> Save; the subgraph lists its inputs in another order than its node."""
    inner = node(5, "Filter", [0.25], [("image", "IMAGE", 1), ("amount", "FLOAT", 3)])
    inner["inputs"][1]["widget"] = {"name": "amount"}
    graph = {
        "id": "uuid-1",
        "inputs": [{"name": "amount"}, {"name": "picture"}],
        "nodes": [inner],
        "links": [link(1, -10, 1, 5, 0), link(2, 5, 0, -20, 0), link(3, -10, 0, 5, 1)],
    }
    outer = node(2, "uuid-1", inputs=[("picture", "IMAGE", 10), ("amount", "FLOAT", None)], **instance)
    save = node(3, "Save", ["p", 5], [("images", "IMAGE", 11)])
    return {
        "nodes": [SOURCE, outer, save],
        "links": [link(10, 1, 0, 2, 0), link(11, 2, 0, 3, 0)],
        "definitions": {"subgraphs": [graph]},
    }


def test_subgraph_is_flattened():
    prompt = to_prompt(subgraph_workflow(), INFO)
    assert prompt["2:5"]["inputs"] == {"image": ["1", 0], "amount": 0.25}
    assert prompt["3"]["inputs"]["images"] == ["2:5", 0]


@pytest.mark.parametrize("inner", ["-1", "5"])
def test_subgraph_nodes_own_value_reaches_the_inner_widget(inner):
    workflow = subgraph_workflow(properties={"proxyWidgets": [[inner, "amount"]]})
    workflow["nodes"][1]["widgets_values"] = [0.75]
    assert to_prompt(workflow, INFO)["2:5"]["inputs"]["amount"] == 0.75


def test_bypassed_subgraph_hands_its_input_on():
    prompt = to_prompt(subgraph_workflow(mode=4), INFO)
    assert set(prompt) == {"1", "3"} and prompt["3"]["inputs"]["images"] == ["1", 0]


def test_unknown_nodes_are_named():
    with pytest.raises(HostError, match="does not have: Bar, Foo"):
        convert([node(1, "Foo"), node(2, "Bar")])


@pytest.mark.parametrize("nonsense", [{}, {"a": 1}, {"nodes": []}, {"1": {"inputs": {}}}])
def test_file_that_is_no_workflow_is_refused(nonsense):
    with pytest.raises(HostError):
        to_prompt(nonsense, INFO)


def test_unreadable_workflow_files_are_explained(tmp_path):
    with pytest.raises(HostError, match="cannot be read"):
        load_workflow(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(HostError, match="not valid JSON"):
        load_workflow(tmp_path / "bad.json")


PROMPT = {
    "1": {"class_type": "Source", "inputs": {"seed": 1, "text": "a"}},
    "2": {"class_type": "Save", "inputs": {"images": ["1", 0]}, "_meta": {"title": "Save v1.0"}},
    "3": {"class_type": "Save", "inputs": {"images": ["1", 0]}, "_meta": {"title": "Other"}},
    "4": {"class_type": "Choice", "inputs": {"mode": "sized", "mode.width": 8}},
}


def test_set_values_are_json_or_text():
    texts = ["a.b=1", "a.c=1.5", "a.d=true", 'a.e="7"', "a.f=a photo of a=b", "a.g=[1, 2]"]
    assert list(parse_sets(texts).values()) == [1, 1.5, True, "7", "a photo of a=b", [1, 2]]
    for bad in ("nonsense", "node=1", "a.b"):
        with pytest.raises(HostError, match="NODE.INPUT=VALUE"):
            parse_sets([bad])


@pytest.mark.parametrize(
    "target, node_id, name",
    [
        ("1.seed", "1", "seed"),
        ("Source.seed", "1", "seed"),
        ("Save v1.0.quality", "2", "quality"),
        ("Choice.mode.width", "4", "mode.width"),
    ],
)
def test_set_finds_nodes_by_id_title_and_class(target, node_id, name):
    changed = apply_overrides(PROMPT, {target: 5}, INFO)
    assert changed[node_id]["inputs"][name] == 5
    assert PROMPT[node_id]["inputs"].get(name) != 5


@pytest.mark.parametrize(
    "target, words",
    [
        ("Save.prefix", r"several nodes \(2, 3\)"),
        ("9.seed", "no such node"),
        ("1.sed", "no input 'sed', only seed, text"),
    ],
)
def test_set_that_fits_nothing_or_too_much_is_an_error(target, words):
    with pytest.raises(HostError, match=words):
        apply_overrides(PROMPT, {target: 5}, INFO)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run", "none.json"], "no workflow file none.json"),
        (["run", __file__, "--set", "x"], "NODE.INPUT=VALUE"),
        (["bench", "none"], "no benchmark 'none'"),
        (["python", "none.py"], "no script none.py"),
        (["serve", "--host-version", "0.1"], "choose one of 0.30.0"),
        (["serve", "--comfyui", "x", "--host-version", "0.30.0"], "cannot be combined"),
        (["serve", "--python", sys.executable], "--comfyui"),
    ],
)
def test_user_errors_are_one_sentence_and_a_status(arguments, words, capsys):
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("Error: ")


def test_pytest_arguments_pass_through_in_order():
    args = cli.parse(["test", "-k", "nodes and not server", "--host-version", "0.30.0", "-x", "tests/test_a.py"])
    assert args.arguments == ["-k", "nodes and not server", "-x", "tests/test_a.py"] and args.host_version == "0.30.0"


def test_script_arguments_are_left_alone():
    args = cli.parse(["python", "--host-version", "0.30.0", "script.py", "--python", "x", "-v"])
    assert (args.script, args.arguments, args.python) == ("script.py", ["--python", "x", "-v"], None)


def test_whole_test_folder_is_run_unless_files_are_named(monkeypatch):
    monkeypatch.chdir(TESTS.parent)
    assert commands._names_tests(["-x", "tests/graph_nodes/test_host_workflows.py::test_reroute_disappears"])
    assert not commands._names_tests(["-k", "tests", "-x"])


def test_chromium_named_by_the_environment_is_used(monkeypatch):
    monkeypatch.setenv("CHROMIUM", sys.executable)
    assert chromium.find_chromium() == sys.executable
    monkeypatch.setenv("CHROMIUM", "/no/such/browser")
    assert chromium.find_chromium() is None
