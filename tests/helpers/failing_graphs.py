"""Graphs and a listener for tests of what goes wrong on the server."""

from graphs import TinyGraph, bake


class CancelAt:
    """Presses cancel when a training of `steps` steps reports this step, and records the last reported step. The node
    also reports how many adapters it has made; those reports have another total."""

    def __init__(self, server, step: int, steps: int):
        self.server, self.step_to_cancel, self.last_step, self.is_cancelled = server, step, 0, False
        self.steps = steps

    def step(self, _node, _title, value, total):
        if total != self.steps:
            return
        self.last_step = value
        if value >= self.step_to_cancel and not self.is_cancelled:
            self.server.client.interrupt()
            self.is_cancelled = True

    def node_started(self, *_): ...

    def finish(self): ...


def bad_training(**changes):
    """A case: a training with these inputs changed; a callable is given the graph."""

    def build():
        graph = TinyGraph()
        graph.train(**{name: value(graph) if callable(value) else value for name, value in changes.items()})
        return graph

    return build


def saving_as(file_name):
    def build():
        graph = TinyGraph()
        tlora = graph.add("TLoRALoad", file="tests/good.safetensors", strength=1.0)[1]
        graph.add("TLoRASave", tlora=tlora, file_name=file_name, dtype="float16")
        return graph

    return build


def baking(**changes):
    """A case: the good file baked with these inputs."""

    def build():
        graph = TinyGraph()
        bake(graph, "tests/good.safetensors", **{"mode": "interval", **changes})
        return graph

    return build
