"""Names and paths of saved files in the loras folders."""

import os
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from training_runs import run


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_saved_files_have_the_permissions_that_the_umask_leaves(base, output):
    before = os.umask(0o027)
    try:
        made = run(base)
    finally:
        os.umask(before)
    made_file = output / "loras" / made.file
    assert made_file.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in made_file.parent.iterdir()) == [made_file.name]


def test_both_separators_of_a_file_name_make_folders_on_every_system(output):
    from tlora_core.errors import TLoRAError
    from tlora_core.hosts.comfy.files import new_lora_path

    assert new_lora_path("a\\b/dog") == new_lora_path("a/b/dog")
    assert new_lora_path("a\\b\\dog").parent == output / "loras" / "a" / "b"
    for climbing in ("..\\dog", "a\\..\\..\\dog"):
        with pytest.raises(TLoRAError, match="leaves the loras folder"):
            new_lora_path(climbing)


def test_a_link_to_another_disk_is_saved_to_as_the_list_reads_it(output, tmp_path_factory):
    import folder_paths

    from tlora_core.errors import TLoRAError
    from tlora_core.hosts.comfy.files import lora_path, name_of, new_lora_path

    disk, loras = tmp_path_factory.mktemp("disk"), output / "loras"
    (loras / "tlora").symlink_to(disk, target_is_directory=True)
    (loras / "own").mkdir()
    (loras / "own" / "deep").symlink_to(disk, target_is_directory=True)
    for name, place in (("tlora/dog", disk), ("tlora/a/dog", disk / "a"), ("own/deep/cat", disk)):
        path = new_lora_path(name)
        path.write_bytes(b"x")
        assert (place / path.name).read_bytes() == b"x"
        listed = folder_paths.recursive_search(str(loras))[0]
        assert name_of(path) in listed and lora_path(name_of(path)) == path
        assert new_lora_path(name).name.endswith("_00002_.safetensors")
    # ".." is of the name, not of the disk behind the link.
    assert new_lora_path("tlora/../dog").parent == loras
    for climbing in ("tlora/../../dog", "../dog", str(disk / "dog"), "own/../../dog"):
        with pytest.raises(TLoRAError, match="leaves the loras folder"):
            new_lora_path(climbing)
    (loras / "gone").symlink_to(disk / "unplugged")
    with pytest.raises(
        TLoRAError, match='"gone/dog", but ".*gone" is a link to ".*unplugged", which does not exist; connect that disk'
    ):
        new_lora_path("gone/dog")
    assert not (disk / "unplugged").exists() and not (disk.parent / "dog_00001_.safetensors").exists()


def test_dates_in_a_file_name_are_filled_in_folder_by_folder(output):
    from tlora_core.hosts.comfy.files import new_lora_path

    path = new_lora_path("%year%/x%year%/dog")
    year = path.parent.parent.name
    assert year.isdecimal() and path.relative_to(output / "loras").parts == (year, f"x{year}", "dog_00001_.safetensors")


@pytest.mark.parametrize(
    "kind, folder, name",
    [
        (PureWindowsPath, r"C:\ComfyUI\models\loras", r"tlora\sks dog_00001_.safetensors"),
        (PurePosixPath, "/ComfyUI/models/loras", "tlora/sks dog_00001_.safetensors"),
    ],
)
def test_a_files_name_is_written_as_the_hosts_list_has_it(comfy, monkeypatch, kind, folder, name):
    import folder_paths

    from tlora_core.hosts.comfy.files import name_of

    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [folder])
    assert name_of(kind(folder, name)) == name
