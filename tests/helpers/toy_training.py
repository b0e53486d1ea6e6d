"""A toy model for tests of the training loop, without ComfyUI."""

import torch
from training_runs import train

from tlora_core import Adapters, make_adapters
from tlora_core.training.config import OPTIMIZERS, TrainConfig

HARD = [
    TrainConfig(
        steps=60,
        learning_rate=0.01,
        batch_size=2,
        optimizer="adamw",
        lr_schedule="cosine",
        warmup_steps=5,
        ema_decay=0.9,
        max_grad_norm=0.5,
        gradient_accumulation=2,
    ),
    *[TrainConfig(steps=60, learning_rate=0.01, batch_size=2, optimizer=name) for name in OPTIMIZERS[1:]],
]


class Toy:
    """Learns a matrix from noise: error = (B A - target) noise."""

    device, needs_loss_scaling = torch.device("cpu"), False

    def __init__(self, adapter, buckets=((0,),)):
        self.adapter, self.buckets, self.rows, self.drawn = adapter, buckets, [], []
        self.target = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))

    def losses(self, rows, generator):
        self.rows.append(rows)
        noise = torch.randn(len(rows), 4, 6, generator=generator)
        self.drawn += noise[:, 0, 0].tolist()
        up, down = self.adapter.factors()
        yield (noise @ (up @ down - self.target).T).square().mean()


def one_lora(width, rank, seed=0):
    return make_adapters("lora", "last_random", {"layer": (width, width)}, rank, seed)["layer"]


def new_adapter():
    return one_lora(6, 4)


def run(config, buckets=((0,),), on_step=lambda step, loss: None, toy=Toy):
    adapter = new_adapter()
    denoiser = toy(adapter, buckets)
    return train(Adapters({"layer": adapter}), denoiser, config, on_step), adapter, denoiser
