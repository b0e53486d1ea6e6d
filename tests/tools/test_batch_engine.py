"""How `batch --ray` uses Ray, which a stand-in plays: the workers' shares of a cluster, and what becomes of a cancel,
of a row whose worker or picture goes away, and of a worker that cannot start. test_batch_ray.py has the real one."""

import importlib
import sys
from collections import deque
from types import ModuleType

import pytest
from hostlib.errors import HostError


class Job:
    """A row, with the pieces of work that its tries bring: events, and the exceptions that end them."""

    def __init__(self, name, *tries, error=None):
        self.name, self.tries, self.error = name, list(tries), error

    def payload(self):
        if self.error:
            raise self.error
        return self


class Rows(deque):
    """The rows to do. An engine that asks for them for ever has lost its workers."""

    asked = 0

    def __bool__(self):
        self.asked += 1
        assert self.asked < 1000
        return len(self) > 0


class Stream:
    """The events of one try."""

    def __init__(self, events):
        self.events = iter(events)

    def __next__(self):
        event = next(self.events)
        return lambda: event() if callable(event) else event


class Method:
    """A remote method of an actor."""

    def __init__(self, call):
        self.remote = call

    def options(self, **_):
        return self


class Actor:
    """A worker, and what it was told to do. absent: what asking for it raises, one after the other."""

    def __init__(self, *absent, said=None):
        self.told, self.absent, self.said = [], list(absent), said
        self.ready = Method(self._ready)
        for name in ("cancel", "close"):
            setattr(self, name, Method(lambda name=name: self.told.append(name) or (lambda: None)))
        self.run = Method(lambda job, state: self.told.append((job.name, state)) or Stream(job.tries.pop(0)))
        self.check = Method(lambda jobs: lambda: self.said(jobs))

    def _ready(self):
        self.told.append("ready")
        return self.absent.pop(0) if self.absent else lambda: None


def raises(error):
    def get():
        raise error

    return get


@pytest.fixture
def on_ray(monkeypatch):
    """batchlib.on_ray, with a Ray that gives at once all it is asked for."""
    ray, errors = ModuleType("ray"), ModuleType("ray.exceptions")
    errors.RayError = type("RayError", (Exception,), {})
    for name in ("RayTaskError", "RayActorError"):
        setattr(errors, name, type(name, (errors.RayError,), {}))
    ray.get = lambda given: given()
    ray.wait = lambda given, num_returns=1, timeout=None: (given[:num_returns], given[num_returns:])
    ray.shutdown = lambda: None
    for name, module in (("ray", ray), ("ray.exceptions", errors)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "batchlib.on_ray", raising=False)
    module = importlib.import_module("batchlib.on_ray")
    monkeypatch.setattr(module, "_connect", lambda address: None)
    yield module
    del sys.modules["batchlib.on_ray"]


@pytest.fixture
def engine(on_ray, monkeypatch):
    """Makes an engine with the given workers."""

    class Options:
        each = {}

        def __init__(self, actors):
            self.left, self.count = list(actors), len(actors)

        def options(self, **_):
            return self

        def remote(self, settings):
            return self.left.pop(0)

    def make(*actors):
        options = Options(actors)
        monkeypatch.setattr(on_ray, "_options", lambda workers, rows: options)
        monkeypatch.setattr(on_ray, "_actor_class", lambda: options)
        return on_ray.OnRay({}, "", None, len(actors))

    return make


def end(state="done"):
    return {"event": "end", "state": state}


def nodes(*resources):
    return lambda: [{"Alive": alive, "Resources": each} for alive, each in resources]


@pytest.mark.parametrize(
    "resources, workers, rows, wanted",
    [
        # A worker for each card, with an even part of its machine's processors.
        ([(True, {"CPU": 16.0, "GPU": 4.0}), (True, {"CPU": 64.0, "GPU": 8.0})], None, 99, (12, 1, 4)),
        ([(True, {"CPU": 16.0, "GPU": 4.0}), (True, {"CPU": 64.0})], None, 99, (4, 1, 4)),
        ([(True, {"CPU": 16.0, "GPU": 4.0})], 2, 99, (2, 1, 4)),
        ([(True, {"CPU": 16.0, "GPU": 4.0})], None, 3, (3, 1, 4)),
        ([(True, {"CPU": 2.0, "GPU": 4.0})], None, 99, (4, 1, 1)),
        ([(True, {"CPU": 16.0, "GPU": 4.0}), (False, {"CPU": 16.0, "GPU": 4.0})], None, 99, (4, 1, 4)),
        # Without cards, a worker for each machine.
        ([(True, {"CPU": 8.0}), (True, {"CPU": 6.0})], None, 99, (2, 0, 6)),
        ([(True, {"CPU": 8.0}), (True, {"CPU": 6.0})], 3, 99, (3, 0, 3)),
        ([(True, {"CPU": 8.0}), (True, {"CPU": 6.0})], 3, 1, (1, 0, 6)),
        ([(True, {"CPU": 1.0})], 2, 99, (2, 0, 1)),
    ],
)
def test_workers_share_cards_and_processors(on_ray, monkeypatch, resources, workers, rows, wanted):
    monkeypatch.setattr(on_ray.ray, "nodes", nodes(*resources), raising=False)
    found = on_ray._options(workers, rows)
    assert (found.count, found.each["num_gpus"], found.each["num_cpus"]) == wanted
    assert found.each["max_concurrency"] > 1, "a cancel comes while a row runs"


def test_a_row_goes_to_each_free_worker_and_the_next_to_whichever_is_free_first(engine):
    first, second = Actor(), Actor()
    jobs = [Job(name, [{"event": "progress"}] * length + [end()]) for name, length in (("a", 1), ("b", 5), ("c", 1))]
    events = list(engine(first, second).run(Rows(jobs), lambda job: job.name.encode()))
    assert [(job.name, event["event"]) for job, event in events].count(("b", "progress")) == 5
    assert [job.name for job, event in events if event["event"] == "end"] == ["a", "c", "b"]
    given = [[told for told in actor.told if isinstance(told, tuple)] for actor in (first, second)]
    assert sorted(given, key=len) == [[("b", b"b")], [("a", b"a"), ("c", b"c")]]


def test_a_row_whose_worker_dies_is_told_as_lost_and_the_worker_is_waited_for(on_ray, engine):
    gone = on_ray.RayActorError("gone")
    # At the first question it is not there yet.
    job, actor = Job("a", [{"event": "progress"}, raises(gone)], [end()]), Actor(lambda: None, raises(gone))
    running, todo = engine(actor), Rows([job])
    told = []
    for _, event in running.run(todo, lambda job: None):
        told.append(event["event"])
        if event["event"] == "lost":
            assert "RayActorError" in event["error"] and actor.told.count("ready") == 2
            todo.append(job)
    assert told == ["progress", "lost", "end"] and actor.told.count("ready") == 4 and actor.told.count(("a", None)) == 2


def test_a_picture_that_goes_away_fails_its_row_alone(engine):
    gone = Job("gone", error=FileNotFoundError(2, "No such file", "p.png"))
    events = list(engine(Actor()).run(Rows([gone, Job("b", [end()])]), lambda job: None))
    assert [(job.name, event["state"]) for job, event in events] == [("gone", "failed"), ("b", "done")]
    assert "p.png cannot be read" in events[0][1]["error"]


def test_a_cancel_goes_once_to_the_workers_that_run(engine):
    busy, idle = Actor(), Actor()
    running, steps = engine(busy, idle), [{"event": "progress"}] * 4
    for place, _ in enumerate(running.run(Rows([Job("a", [*steps, end("cancelled")])]), lambda job: None)):
        if place == 0:
            running.cancel()
    assert busy.told.count("cancel") == 1 and "cancel" not in idle.told
    running.close()
    assert busy.told[-1] == idle.told[-1] == "close"


def test_what_a_worker_says_is_handed_on_in_its_words(on_ray, engine):
    wrong = on_ray.RayTaskError("a long traceback")
    wrong.cause = HostError("ComfyUI is not there.")
    assert engine(Actor(said=len)).check([{}, {}]) == 2
    with pytest.raises(HostError, match="^ComfyUI is not there.$"):
        engine(Actor(said=lambda jobs: raises(wrong)())).check([{}])
    [(_, event)] = engine(Actor()).run(Rows([Job("a", [raises(wrong)])]), lambda job: None)
    assert event == {"event": "lost", "error": "ComfyUI is not there."}


def test_a_worker_that_can_never_start_ends_the_batch(on_ray, engine):
    never = on_ray.RayActorError("no module")
    never.actor_init_failed = True
    with pytest.raises(HostError, match="cannot start: no module"):
        engine(Actor(raises(never))).check([{}])
