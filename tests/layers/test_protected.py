"""The trial that finds out what a block overwrites."""

import weakref

import torch

from tlora_core.layers.protected import Protected


class Block(torch.nn.Module):
    """Autograd saves the result of the function that it calls."""

    def __init__(self):
        super().__init__()
        self.made = []

    def forward(self, x):
        result = torch.exp(x)
        self.made.append(weakref.ref(result.untyped_storage()))
        return result * 2


def test_a_trial_holds_nothing_once_it_is_over():
    block = Block()
    protected = Protected(block)
    output = protected.forward(torch.ones(3, requires_grad=True))
    assert protected.places == {} and len(block.made) == 2, "the trial, and the block itself"
    assert block.made[0]() is None and block.made[1]() is not None
    del output
    assert block.made[1]() is None
