"""Blocks that overwrite what autograd has saved give the gradients of those that do not."""

import pytest
import torch
from torch import nn

WIDTH = 8


class Block(nn.Module):
    """A block whose residual stream is its input. `overwrites`: whether it writes where it can instead of making new
    tensors, or not; the numbers are the same."""

    def __init__(self, overwrites: bool):
        super().__init__()
        self.norm, self.first, self.second = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.overwrites, self.runs = overwrites, 0

    def forward(self, x, options):
        self.runs += 1
        return self.written(x) if self.overwrites else self.made(x)


class OntoItsInput(Block):
    """Which a norm has saved."""

    def made(self, x):
        return x + self.first(self.norm(x))

    def written(self, x):
        return x.add_(self.first(self.norm(x)))


class OntoItsInputAfterAFunction(Block):
    """Which the block itself has called, twice."""

    def made(self, x):
        x = x + x.square()
        return x + self.first(x.square())

    def written(self, x):
        x.add_(x.square())
        return x.add_(self.first(x.square()))


class OntoAResult(Block):
    """Which the function that made it has saved; and onto a part of another tensor."""

    def made(self, x):
        y = self.first(x).sigmoid() * 3
        z = self.second(y)
        return z.square() + torch.cat([z[..., :2] + 1, z[..., 2:]], -1)

    def written(self, x):
        y = self.first(x).sigmoid()
        y.mul_(3)
        z = self.second(y)
        squared = z.square()
        z[..., :2].add_(1)
        return squared + z


KINDS = [OntoItsInput, OntoItsInputAfterAFunction, OntoAResult]


@pytest.fixture
def pair(request):
    """The block that overwrites, and the one with the same weights that does not, in float64."""
    torch.manual_seed(0)
    blocks = request.param(True).double(), request.param(False).double()
    blocks[1].load_state_dict(blocks[0].state_dict())
    return blocks


def stream():
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(block, run) -> list[torch.Tensor]:
    """Of the input and of all weights. The host, too, hands its blocks what another layer has just made."""
    x = stream().requires_grad_()
    loss = run(x * 1, {"number": 3}).square().sum()
    return list(torch.autograd.grad(loss, [x, *block.parameters()], allow_unused=True))


def assert_same(ours, wanted):
    for mine, right in zip(ours, wanted):
        assert (mine is None) == (right is None)
        if mine is not None:
            torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("pair", KINDS, indirect=True)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_right(pair, checkpointed):
    from tlora_core.layers.checkpointing import Checkpointed
    from tlora_core.layers.overlay import replaced_forward
    from tlora_core.layers.protected import Protected

    overwriting, other = pair
    with replaced_forward() as replace:
        replace(overwriting, Protected(overwriting).forward)
        if checkpointed:
            replace(overwriting, Checkpointed(overwriting).forward)
            overwriting.requires_grad_(False)  # as the host's are: a checkpointed block gives no gradient to its own
        for _ in range(2):  # with the trial, and after it
            ours, wanted = (
                (gradients(overwriting, overwriting), gradients(other, other))
                if not checkpointed
                else ([of_input(overwriting)], [of_input(other)])
            )
            assert_same(ours, wanted)


def of_input(block) -> torch.Tensor:
    x = stream().requires_grad_()
    block(x * 1, {}).square().sum().backward()
    return x.grad


@pytest.mark.parametrize("pair", KINDS, indirect=True)
def test_autograd_alone_refuses_such_a_block(pair):
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(pair[0], pair[0])


@pytest.mark.parametrize("pair, places", [*zip(KINDS, [{"norm": 1}, {"": 2}, {"": 2}])], indirect=["pair"])
def test_only_what_is_overwritten_is_copied(pair, places):
    from tlora_core.layers.protected import Protected
    from tlora_core.layers.saving import saving

    block, other = pair
    protected, plain = Protected(block), Protected(other)
    kept = []
    for each in (protected, plain):
        gradients(each.block, each.forward)
        with saving(lambda t: kept[-1].append(t.untyped_storage().data_ptr()) or t):
            kept.append([])
            each.forward(stream().requires_grad_() * 1, {})
    names = {module: name for name, module in block.named_modules()}
    assert {names[module]: len(numbers) for module, numbers in protected.places.items()} == places
    assert plain.places == {}
    assert len(set(kept[0])) <= len(set(kept[1]))  # a block that writes in place saves no more than one that does not


def test_a_block_is_tried_once_and_only_where_something_is_recorded():
    from tlora_core.layers.protected import Protected

    block = OntoItsInput(True).requires_grad_(False)
    protected = Protected(block)
    x = stream().float()
    with torch.no_grad():
        protected.forward(x.clone(), {})
    protected.forward(x.clone(), {})  # nothing to learn in it yet
    assert block.runs == 2 and protected.places is None
    for runs in (4, 5, 6):
        protected.forward(x.clone().requires_grad_() * 1, {})
        assert block.runs == runs


def test_the_trial_changes_nothing_that_the_block_is_given():
    from tlora_core.layers.protected import Protected

    given, seen = stream().requires_grad_() * 1, []

    class Counting(OntoItsInput):
        def forward(self, x, options):
            seen.append((x.detach().clone(), dict(options)))
            options["number"] += 1
            return super().forward(x, options)

    options = {"number": 3}
    Protected(Counting(True).double()).forward(given, options)
    assert len(seen) == 2 and torch.equal(seen[0][0], seen[1][0]) and seen[0][1] == seen[1][1] == {"number": 3}
    assert options == {"number": 4}


def test_a_trial_holds_nothing_once_it_is_over():
    import weakref

    from tlora_core.layers.protected import Protected

    made = []

    class Exponential(nn.Module):
        """Autograd saves the result of the function that it calls."""

        def forward(self, x):
            result = torch.exp(x)
            made.append(weakref.ref(result.untyped_storage()))
            return result * 2

    protected = Protected(Exponential())
    output = protected.forward(torch.ones(3, requires_grad=True))
    assert protected.places == {} and len(made) == 2, "the trial, and the block itself"
    assert made[0]() is None and made[1]() is not None
    del output
    assert made[1]() is None


class TestSaving:
    def test_the_outer_pack_gets_what_the_inner_one_gives(self):
        from tlora_core.layers.saving import saving

        x, seen = torch.ones(3, requires_grad=True), []
        with saving(lambda t: seen.append(t.clone()) or t):
            with saving(lambda t: t * 5):
                y = x.square()
            z = x.square()
        assert [t.tolist() for t in seen] == [[5.0] * 3, [1.0] * 3]
        assert torch.autograd.grad(y.sum() + z.sum(), x)[0].tolist() == [12.0] * 3

    def test_what_is_overwritten_afterwards_is_an_error_as_without_it(self):
        from tlora_core.layers.saving import saving

        x = torch.ones(3, requires_grad=True) * 1
        with saving(lambda t: t):
            y = x.square()
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_it_ends_with_its_block_also_after_an_error(self):
        from tlora_core.layers.saving import saving

        seen = []
        with pytest.raises(ValueError), saving(lambda t: seen.append(t) or t):
            raise ValueError
        with saving(lambda t: t):
            torch.ones(3, requires_grad=True).square()
        assert not seen
