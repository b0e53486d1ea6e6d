"""README's table of models is what the tests and the defaults say today."""

from places import REPO


def test_the_readmes_table_of_models_is_that_of_today(comfy):
    """If it fails, run: python3 tools/host.py python tools/make_model_table.py"""
    from make_model_table import written

    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert written(readme) == readme


def test_the_table_says_what_the_tests_do_with_a_family(comfy, monkeypatch):
    import family_table
    import make_model_table

    for changes, says in (
        ({}, "trained and sampled"),
        ({"refused": "makes one picture from another"}, "sampled; training refused: makes one picture from another"),
    ):
        monkeypatch.setitem(family_table.TABLE, "flux", family_table.Row({}, **changes))
        assert f"| flux, Flux | {says} | not yet | 1024 | 500 | vanilla_tlora, prodigy |" in make_model_table.table()
