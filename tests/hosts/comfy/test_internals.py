"""What the pack leans on of ComfyUI's internals: told at the start where it is missing, and done without where that
is possible."""

import importlib
import re

import pytest
import sampling_runs as runs
from places import REPO

# Only internals.py reads these, as they have a stand-in there.
READ_IN_ONE_PLACE = re.compile(
    r"\.current_patcher\b|current_weight_patches_uuid|\.hook_patches\b|[\"']_v[\"']|[\"']_v_\w+[\"']|COMPILE_KEY"
)


def test_this_version_of_the_host_has_all(comfy, caplog):
    from tlora_core.hosts.comfy.model.internals import check

    assert check() == [] and not caplog.records


@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        ("comfy.samplers", "cond_cat", "without comfy.samplers.cond_cat, training fails"),
        (
            "comfy.model_patcher",
            "ModelPatcher.loaded_size",
            "without comfy.model_patcher.ModelPatcher.loaded_size, the",
        ),
    ],
)
def test_what_is_missing_is_told_in_one_line(comfy, caplog, monkeypatch, module, name, what):
    from tlora_core.hosts.comfy.model.internals import check

    *owners, attribute = name.split(".")
    owner = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    monkeypatch.delattr(owner, attribute)
    (missing,) = check()
    (record,) = caplog.records
    assert (missing.module, missing.name) == (module, name)
    assert what in record.getMessage() and "All else works" in record.getMessage() and "\n" not in record.getMessage()


def test_attributes_that_only_instances_have_and_whole_modules_can_be_missing_too(comfy, caplog, monkeypatch):
    from tlora_core.hosts.comfy.model import internals

    parts = [
        internals.Part("comfy.model_base", "?current_patcher", "a"),
        internals.Part("comfy.model_base", "?current_pather", "b"),
        internals.Part("comfy.no_such_module", "anything", "b"),
        internals.Part("a_package_that_is_not_installed", "anything", "c"),
    ]
    monkeypatch.setattr(internals, "PARTS", parts)
    assert internals.check() == parts[1:3]
    assert "without comfy.model_base.current_pather and comfy.no_such_module.anything, b." in caplog.text


def test_sampling_puts_adapters_beside_where_the_host_does_not_tell_of_its_patches(unet, tlora, monkeypatch):
    base = unet.model
    # As a host without it: nothing of it in the model, and nobody to set it again.
    monkeypatch.delattr(base, "current_weight_patches_uuid")
    monkeypatch.setattr(type(unet), "load", _without_uuid(type(unet).load))
    ways = runs.Ways(monkeypatch)
    runs.sample(runs.apply(unet, tlora), *runs.texts(), steps=1)
    assert ways.used == {"product"}


def _without_uuid(load):
    def loaded(patcher, *args, **kwargs):
        result = load(patcher, *args, **kwargs)
        vars(patcher.model).pop("current_weight_patches_uuid", None)
        return result

    return loaded


def test_sampling_works_without_the_key_of_compiled_models(unet, tlora, monkeypatch):
    from comfy_api.torch_helpers import torch_compile

    expected = runs.sample(runs.apply(unet, tlora), *runs.texts(), steps=1)
    monkeypatch.delattr(torch_compile, "COMPILE_KEY")
    assert (runs.sample(runs.apply(unet, tlora), *runs.texts(), steps=1) == expected).all()


def test_training_works_where_the_host_has_no_mark_for_it(unet, monkeypatch):
    import comfy.model_management

    from tlora_core.hosts.comfy.training.session import training_session

    monkeypatch.delattr(comfy.model_management, "in_training")
    with training_session(unet):
        assert comfy.model_management.in_training is True
    assert comfy.model_management.in_training is False
    del comfy.model_management.in_training


def test_what_has_a_stand_in_is_read_in_one_place():
    folder = REPO / "tlora_core" / "hosts" / "comfy"
    files = [path for path in folder.rglob("*.py") if path.name != "internals.py"]
    assert len(files) > 20
    assert [str(path) for path in files if READ_IN_ONE_PLACE.search(path.read_text(encoding="utf-8"))] == []
