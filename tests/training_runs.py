"""Trainings on the tiny base as the Train node makes them. Import inside tests that use `comfy`."""
import json

import torch


def images(count=1, size=64):
    from tlora_core.dataset import training_images

    generator = torch.Generator().manual_seed(5)
    return training_images(torch.rand(count, size, size, 3, generator=generator))


def request(steps=6, rate=0.01, **changes):
    from tlora_core.comfy_host.personalize import TrainRequest
    from tlora_core.config import TrainConfig

    config = TrainConfig(steps=steps, learning_rate=rate, **changes.pop("config", {}))
    return TrainRequest(**{"token": "sks", "class_word": "heart", "rank": 4, "min_rank": 2, "resolution": 64, **changes}, config=config)


def run(base, asked=None, file_name="run/heart", pictures=None, prior=(), **keeping):
    """As the host runs a node: in inference mode."""
    from tlora_core.comfy_host.training_run import Keeping, train_or_find

    with torch.inference_mode():
        return train_or_find(*base, pictures or images(), asked or request(), Keeping(**keeping), file_name, None, prior)


def folders(output):
    """Those of the runs, in the order of their beginning."""
    return sorted((output / "tlora_runs").iterdir(), key=lambda path: json.loads((path / "run.json").read_text())["started"])


def record(output, index=-1):
    return json.loads((folders(output)[index] / "run.json").read_text())


def same(one, two):
    return one.layers.keys() == two.layers.keys() and all(
        torch.equal(one.layers[k].up, two.layers[k].up) and torch.equal(one.layers[k].down, two.layers[k].down) for k in one.layers)
