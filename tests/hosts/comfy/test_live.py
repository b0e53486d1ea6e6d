"""Live runs: what a page learns about a training, and what it may ask for."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from page_clients import ask, opened_pages
from PIL import Image


@pytest.fixture
def live(comfy, monkeypatch):
    from tlora_core.hosts.comfy.page import training as live

    monkeypatch.setattr(live.LiveRun, "_runs", {})
    return live


@pytest.fixture
def pages(live, monkeypatch):
    return opened_pages(monkeypatch)


def test_no_gpu_is_woken_that_the_host_leaves_alone(live, monkeypatch):
    """As with --cpu on a machine that has one: its driver would take hundreds of MB."""
    woken = []
    monkeypatch.setattr(live.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(live.torch.cuda, "reset_peak_memory_stats", lambda *device: woken.append(device))
    live.LiveRun.begin("7", 10)
    assert live.comfy.model_management.get_torch_device().type == "cuda" or not woken


def test_state_has_steps_time_left_and_the_curve_with_its_running_mean(live, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    run = live.LiveRun.begin("7", steps=40, title="olive heart")
    for step in range(1, 11):
        now[0] += 0.5
        run.report(step, float(step % 2))
    state = run.state()
    assert (state["state"], state["step"], state["steps"], state["node"], state["title"]) == (
        "running",
        10,
        40,
        "7",
        "olive heart",
    )
    assert state["rate"] == pytest.approx(2.0) and state["left"] == pytest.approx(15.0)
    assert [point[:2] for point in state["points"]] == [(step, step % 2) for step in range(1, 11)]
    # A window of 40 // 20 = 2 steps: 1, then each time halfway to the new value.
    assert [point[2] for point in state["points"][:4]] == [1, 0.5, 0.75, 0.375]
    assert state["memory_kind"] == "process" and state["memory"] > 50


def test_running_mean_ends_where_the_loss_pictures_does(live):
    losses = [((k * 7919) % 101) / 101 for k in range(1, 201)]
    run = live.LiveRun.begin(None, steps=200)
    for step, loss in enumerate(losses, 1):
        run.report(step, loss)
    smooth = None
    for i, loss in enumerate(losses):  # as plot.loss_curve says: over a twentieth of the steps
        smooth = loss if i == 0 else smooth + (loss - smooth) / min(i + 1, 10)
    assert run.state()["points"][-1][2] == pytest.approx(smooth)


def test_resumed_run_measures_its_pace_from_its_own_first_step(live, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    run = live.LiveRun.begin("7", steps=100, first_step=50)
    for step in range(1, 51):
        run.report(step, 0.5)  # the earlier run's curve
    assert run.state()["step"] == 50 and run.state()["rate"] is None and len(run.state()["points"]) == 50
    now[0] = 1.0
    run.report(51, 0.5)
    assert run.state()["rate"] == pytest.approx(1.0) and run.state()["left"] == pytest.approx(49.0)


def test_events_go_to_pages_that_listen_are_throttled_and_leave_out_no_step(live, pages, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    run = live.LiveRun.begin("3:7", steps=100)
    for step in range(1, 101):
        now[0] += 0.05
        run.report(step, 0.5)
    run.finish("done", file="tlora/x.safetensors")
    assert {(event, sid) for event, _, sid in pages.sent} == {("tlora.training", "page")}
    states = [data for _, data, _ in pages.sent]
    assert 15 <= len(states) <= 25
    assert [point[0] for state in states for point in state["points"]] == list(range(1, 101))
    assert states[0]["state"] == "running" and states[0]["node"] == "3:7"
    assert (states[-1]["state"], states[-1]["file"], states[-1]["step"]) == ("done", "tlora/x.safetensors", 100)


def test_a_page_listens_from_when_it_asks_for_the_runs_until_its_socket_closes(live, pages):
    from tlora_core.hosts.comfy.page.pages import tell

    for client in ("still loading", "never seen", ""):
        [(status, _)] = ask(("GET", f"/tlora/runs?client={client}", {}))
        assert status == 200
    assert ask(("GET", "/tlora/runs", {}))[0][0] == 200
    tell("tlora.training", {})
    assert [sid for _, _, sid in pages.sent] == ["page", "still loading"]
    pages.sockets["page"] = object()  # loaded again: the same client, which is deaf until it asks
    pages.sent.clear()
    tell("tlora.training", {})
    assert [sid for _, _, sid in pages.sent] == ["still loading"]


def test_nan_loss_does_not_reach_the_page(live, pages):
    run = live.LiveRun.begin("7", steps=3)
    for step, loss in ((1, 0.5), (2, float("nan")), (3, float("inf"))):
        run.report(step, loss)
    run.finish("failed", "The loss was no number.")
    assert [point[0] for point in run.state()["points"]] == [1]
    assert pages.sent[-1][1]["step"] == 3


def test_a_long_curve_is_thinned_and_keeps_its_end(live):
    run = live.LiveRun.begin(None, steps=2500)
    for step in range(1, 2501):
        run.report(step, 1.0)
    steps = [point[0] for point in run.state()["points"]]
    assert len(steps) == live.CURVE_POINTS and steps[-1] == 2500 and steps == sorted(set(steps))


def test_new_run_of_a_node_replaces_the_old_one_and_only_the_last_few_are_kept(live):
    first = live.LiveRun.begin("7", steps=1)
    second = live.LiveRun.begin("7", steps=1)
    assert live.LiveRun.find(first.id) is None and live.LiveRun.find(second.id) is second
    others = [live.LiveRun.begin(f"other {i}", steps=1) for i in range(live.RUNS_KEPT)]
    assert [state["id"] for state in live.LiveRun.states()] == [run.id for run in others]


def test_validation_pictures_span_the_training_when_there_are_too_many(live):
    run = live.LiveRun.begin("7", steps=1000)
    for step in range(0, 1000, 5):
        run.validation(step, Image.new("RGB", (8, 8), (step % 256, 0, 0)), ["a photo of sks dog"])
    kept = run.state()["pictures"]
    steps = [picture["step"] for picture in kept]
    assert len(kept) <= live.PICTURES_KEPT and steps[0] == 0 and steps[-1] == 995 and steps == sorted(steps)
    assert all(run.picture(picture["index"]).step == picture["step"] for picture in kept)
    assert kept[0]["captions"] == ("a photo of sks dog",)


def test_a_run_shows_its_scores_and_those_of_each_picture(live, pages):
    run = live.LiveRun.begin("7", steps=10)
    run.validation(1, Image.new("RGB", (8, 4)), ["a", "b"])
    assert run.state()["scores"] is None and run.state()["pictures"][0]["scores"] is None
    step = {"step": 2, "likeness": 0.7, "likeness_error": 0.01, "obedience": None, "obedience_error": None}
    of_run = {"steps": [step], "best": 2, "sentence": "step 2: still learning.", "past": 0}
    of_pictures = [{"likeness": 0.7, "obedience": None}, {"likeness": None, "obedience": None}]
    run.scored(of_run)
    run.validation(2, Image.new("RGB", (8, 4)), ["a", "b"], of_pictures)
    state = json.loads(json.dumps(run.state()))
    assert state["scores"] == of_run and [picture["scores"] for picture in state["pictures"]] == [None, of_pictures]
    assert pages.sent[-1][1]["scores"] == of_run


def test_page_gets_runs_and_pictures_and_404_for_what_is_not_there(live):
    run = live.LiveRun.begin("7", steps=10)
    run.validation(1, Image.new("RGB", (4096, 1024)), ["a", "b", "c", "d"])
    run.validation(2, Image.new("RGBA", (64, 64), (1, 2, 3, 255)), [])
    listed, large, small, no_picture, no_number, no_run = ask(
        ("GET", "/tlora/runs", {}),
        *[
            ("GET", f"/tlora/runs/{path}", {})
            for path in (
                f"{run.id}/validation/0",
                f"{run.id}/validation/1",
                f"{run.id}/validation/2",
                f"{run.id}/validation/..%2f1",
                "../../etc/validation/0",
            )
        ],
    )
    assert [state["id"] for state in json.loads(listed[1])] == [run.id]
    assert Image.open(io.BytesIO(large[1])).size == (3072, 768)
    assert Image.open(io.BytesIO(small[1])).getpixel((5, 5)) == (1, 2, 3)
    assert [answer[0] for answer in (no_picture, no_number, no_run)] == [404, 404, 404]


def test_stop_and_checkpoint_reach_the_training_and_only_while_it_runs(live):
    run = live.LiveRun.begin("7", steps=10)
    assert not run.stop_requested and not run.take_save_request()
    path = f"/tlora/runs/{run.id}"
    assert [a[0] for a in ask(("POST", path + "/checkpoint", {}), ("POST", path + "/stop", {}))] == [200, 200]
    assert run.stop_requested and run.take_save_request() and not run.take_save_request()
    run.finish("stopped")
    assert [a[0] for a in ask(("POST", path + "/checkpoint", {}), ("POST", path + "/stop", {}))] == [409, 409]
    assert [a[0] for a in ask(("POST", "/tlora/runs/other/stop", {}), ("GET", path + "/stop", {}))] == [404, 405]


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Origin": "own"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://proxy.example"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
    ids=str,
)
def test_other_sites_may_not_steer_a_training(live, headers, status):
    run = live.LiveRun.begin("7", steps=10)
    [(got, _)] = ask(("POST", f"/tlora/runs/{run.id}/stop", headers))
    assert got == status and run.stop_requested == (status == 200)


def test_reports_and_requests_from_several_threads_lose_nothing(live, pages):
    run = live.LiveRun.begin("7", steps=400)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(lambda: (run.state(), run.request("checkpoint"))) for _ in range(100)]
        for step in range(1, 401):
            run.report(step, 0.5)
        [one.result() for one in asked]
    run.finish("done")
    assert [point[0] for _, data, _ in pages.sent for point in data["points"]] == list(range(1, 401))


def test_a_run_belongs_to_the_workflow_that_is_being_run(live, pages):
    from comfy_execution.utils import CurrentNodeContext

    class Queue:
        def get_current_queue_volatile(self):
            return [(0, "prompt 1", {}, {"extra_pnginfo": {"workflow": {"id": "workflow 1"}}}, [])], []

    pages.prompt_queue = Queue()
    with CurrentNodeContext("prompt 1", "7"):
        run = live.LiveRun.begin("7", steps=1)
    with CurrentNodeContext("prompt 2", "7"):
        other = live.LiveRun.begin("7", steps=1)
    assert [state["workflow"] for state in live.LiveRun.states()] == ["workflow 1", None]
    assert live.LiveRun.find(run.id) is run and live.LiveRun.find(other.id) is other


def test_a_run_has_the_mark_that_the_page_wrote_into_its_node_also_in_a_subgraph(live):
    from tlora_core.hosts.comfy.page.queued import owner_of

    node = {"id": 7, "type": "TLoRATrainFromImage", "properties": {"tlora_run": "a mark"}}
    inner = {"id": 3, "type": "sub", "properties": {}}
    workflow = {
        "nodes": [{**node, "properties": {"tlora_run": "another"}}, inner],
        "definitions": {"subgraphs": [{"id": "sub", "nodes": [node]}]},
    }
    assert owner_of(workflow, "7") == "another" and owner_of(workflow, "3:7") == "a mark"
    for strange in (
        {},
        {"nodes": None},
        {"nodes": [None]},
        {"nodes": [{"id": 7}]},
        {"definitions": 3, "nodes": []},
        {"nodes": [{"id": 7, "type": "x", "properties": {"tlora_run": {"no": "text"}}}]},
    ):
        assert owner_of(strange, "7") is None


def test_what_ends_a_node_before_its_run_begins_is_its_run(live):
    from types import SimpleNamespace

    from comfy.model_management import InterruptProcessingException

    node = SimpleNamespace(hidden=SimpleNamespace(unique_id="7"))

    def ending(error):
        @live.shown_when_it_fails
        def execute(node):
            raise error

        with pytest.raises(type(error)):
            execute(node)
        [state] = live.LiveRun.states()
        return state["state"], state["message"], state["steps"]

    live.LiveRun.begin("7", steps=9).finish("done")
    assert ending(ValueError("image has 4 channels.")) == ("failed", "image has 4 channels.", 0)
    assert ending(KeyError()) == ("failed", "KeyError", 0)
    assert ending(InterruptProcessingException())[0] == "cancelled"
