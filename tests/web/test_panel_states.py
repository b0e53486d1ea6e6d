"""The training panel on states of runs as the server sends them."""

from browser import load_workflow
from panel_page import PANEL, QUICKSTART, RUN, TRAIN, press, tell, wait_for


def test_a_screen_reader_hears_the_progress_and_a_button_says_when_the_server_is_away(page):
    load_workflow(page, QUICKSTART)
    tell(page, RUN)
    wait_for(page, "panel.state === 'running'")
    bar = page.get_by_role("progressbar", name="Training")
    assert [bar.get_attribute(name) for name in ("aria-valuemin", "aria-valuenow", "aria-valuemax")] == ["0", "3", "9"]
    state = page.locator(".tlora-state")
    assert state.get_attribute("role") == "status"

    said = state.text_content()
    page.route("**/runs/x/stop", lambda route: route.fulfill(status=409, json={"error": "The run has ended."}))
    page.route("**/runs/x/checkpoint", lambda route: route.abort())
    with page.expect_response("**/runs/x/stop"):
        press(page, "Stop and keep")
    assert state.text_content() == said  # that it has ended comes by itself
    press(page, "Checkpoint now")
    page.get_by_text("The server did not respond").wait_for()
    tell(page, RUN | {"sequence": 2, "step": 4})
    wait_for(page, "panel.step === 4")
    assert state.text_content() == said


def test_after_the_server_was_away_the_page_shows_what_it_has_now(page):
    load_workflow(page, QUICKSTART)
    tell(page, RUN)
    wait_for(page, "panel.step === 3")
    asked = []
    page.route("**/tlora/runs?*", lambda route: asked.append(route))

    def come_back():
        """The page's request for the runs, which is not answered yet."""
        page.evaluate(
            """() => import("/scripts/api.js").then(({api}) => api.dispatchEvent(new CustomEvent("reconnected")))"""
        )
        for _ in range(200):
            if asked:
                return asked.pop()
            page.wait_for_timeout(100)

    request = come_back()
    tell(page, RUN | {"sequence": 3, "step": 5})  # while the answer is under way, and newer than that
    request.fulfill(json=[RUN | {"sequence": 2, "step": 4}])
    page.wait_for_timeout(500)
    assert page.evaluate(PANEL, TRAIN)["step"] == 5
    come_back().fulfill(json=[])  # a server that was started again knows of no run
    wait_for(page, "panel.state === 'idle'")


def test_the_panel_tells_how_a_training_uses_memory(page):
    load_workflow(page, QUICKSTART)
    tell(page, RUN | {"state": "running", "way": {"memory": "lowest", "in_ram": 8.5 * 2**30, "weights": 12 * 2**30}})
    shown = wait_for(page, "panel.state === 'running'")
    assert shown["numbers"].endswith("2.0 GB GPU peakmemory lowest")
    assert "streams 8.5 of 12.0 GiB" in page.evaluate("() => document.querySelector('.tlora-numbers').title")
    tell(page, RUN | {"sequence": 2, "way": {"memory": "lowest", "in_ram": None, "weights": 12 * 2**30}})
    page.wait_for_function("() => document.querySelector('.tlora-numbers').title.includes('ComfyUI itself streams')")
