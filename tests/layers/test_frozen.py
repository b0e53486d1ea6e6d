"""The explicit backward passes, compared with autograd's own in float64. Plain torch."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from tlora_core import add_low_rank
from tlora_core.layers.checkpointing import Checkpointed
from tlora_core.layers.overlay import Overlay, overlaid
from tlora_core.layers.text_memo import Text, TextMemo
from tlora_core.layers.trained import Frozen
from tlora_core.method.bank import Bank

pytestmark = pytest.mark.usefixtures("one_thread")
OUT, IN, RANK = 12, 7, 5


def adapter(kind, seed=0, out=OUT):
    """The second of a bank of two."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, S, A = rand(2, out, RANK), rand(2, 1, RANK), rand(2, RANK, IN)
    bank = Bank(B, S if kind == "ortho" else None, A)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(rand(*parameter.shape))
    return bank[1]


def leaves_of(*adapters):
    return [p for adapter in adapters for p in adapter.module.parameters()]


def gradients(forward, x, leaves):
    x = x.clone().requires_grad_() if x.requires_grad else x
    output = forward(x)
    weights = torch.arange(output.numel(), dtype=torch.float64).view(output.shape).sin()
    leaves = [*leaves, x] if x.requires_grad else leaves
    return [output, *torch.autograd.grad((output * weights).sum(), leaves)]


@pytest.fixture
def layer():
    torch.manual_seed(1)
    return nn.Linear(IN, OUT).double().requires_grad_(False)


@pytest.mark.parametrize(
    "stands_in, wants_input",
    [
        *((each, wants) for each in ("layer", "frozen", "somebody else's") for wants in (True, False)),
        ("frozen, for a text", False),  # which is not trained
    ],
)
@pytest.mark.parametrize("active", [RANK, 3, 1, torch.tensor([2, 0, 5]), torch.tensor([2, 1, 2])])
@pytest.mark.parametrize("kind", ["ortho", "lora"])
def test_adapters_gradients_are_those_of_the_formula(layer, kind, active, stands_in, wants_input):
    x = torch.randn(3, 4, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_(
        wants_input
    )
    parts = [(adapter(kind, 0, OUT), 0), (adapter(kind, 1, 6), 6)]
    leaves = leaves_of(*(a for a, _ in parts))
    scale, text = 1.0, None
    if stands_in.startswith("frozen"):
        layer.forward = Frozen(layer).forward
        if "text" in stands_in:
            text = Text(x)
    elif stands_in != "layer":
        own, scale = layer.forward, 2.0
        layer.forward = lambda x: own(x) * scale

    def by_formula(x):
        output = torch.nn.functional.linear(x, layer.weight, layer.bias) * scale
        for a, row in parts:
            output = add_low_rank(output, x, *a.factors(), active, a.group, row)
        return output

    for _ in range(2):  # what is kept of a text is there the second time
        with overlaid((Overlay(layer, a, active, row) for a, row in parts), text=text):
            ours = gradients(layer, x, leaves)
    for one, other in zip(ours, gradients(by_formula, x, leaves)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["ortho", "lora"])
def test_gradients_of_a_layer_that_is_called_twice_add_up(layer, kind):
    x, a = torch.randn(2, 4, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), adapter(kind)
    leaves = leaves_of(a)

    def by_formula(x):
        return add_low_rank(torch.nn.functional.linear(x, layer.weight, layer.bias), x, *a.factors(), 3, a.group)

    wanted = gradients(lambda x: by_formula(x) + by_formula(x.cos()), x, leaves)
    with overlaid([Overlay(layer, a, 3)]):
        ours = gradients(lambda x: layer(x) + layer(x.cos()), x, leaves)
    for one, other in zip(ours, wanted):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: nn.Linear(6, 8), (2, 5, 6)),
        (lambda: nn.Conv1d(6, 4, 3, padding=1, stride=2), (2, 6, 9)),
        (lambda: nn.Conv2d(6, 4, 3, padding=1, stride=2, groups=2), (2, 6, 8, 9)),
        (lambda: nn.Conv3d(3, 4, 2, dilation=2), (1, 3, 4, 5, 6)),
        (lambda: nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect"), (2, 6, 8, 9)),
        (lambda: nn.GroupNorm(3, 6), (2, 6, 5)),
    ],
)
def test_a_frozen_layer_that_fetches_its_weight_keeps_none(make, shape):
    torch.manual_seed(0)
    layer, fetched, saved = make().double().requires_grad_(False), [], []
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plain = gradients(layer, x, [])

    @contextmanager
    def fetch(layer, like):
        fetched.append(like)
        yield layer.weight.clone(), None

    layer.forward = Frozen(layer, fetch).forward
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    ours = gradients(layer, x, [])
    for one, other in zip(ours, plain):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert not any(t.data_ptr() == layer.weight.data_ptr() for t in saved)
    assert len(fetched) == (
        0 if isinstance(layer, nn.GroupNorm) or getattr(layer, "padding_mode", "") == "reflect" else 1
    )


def test_an_adapter_saves_the_input_once_for_its_layers_and_no_factors(layer):
    other = nn.Linear(IN, OUT).double().requires_grad_(False)
    x = torch.randn(3, 400, IN, dtype=torch.float64, requires_grad=True)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for each in (layer, other):
        each.forward = Frozen(each).forward
    inner = x * 1
    with overlaid([Overlay(layer, adapter("ortho"), 3), Overlay(other, adapter("ortho", 1), 3)]):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = layer(inner), other(inner)
    # The factors, which a bank shares, are smaller.
    large = [size for size in saved.values() if size >= 8 * 3 * 400 * 3]
    assert len(large) == 3 and sum(large) == 8 * 3 * 400 * (IN + 2 * 3)
    assert sum(saved.values()) - sum(large) <= 2 * 2 * 2 * 8 * 2 * 3 * (IN + OUT)
    del outputs


def test_what_a_layer_makes_of_the_text_is_computed_once(layer):
    calls, own = [], layer.forward
    layer.forward = lambda x: calls.append(x) or own(x)
    layer.forward = Frozen(layer).forward
    a, text = adapter("ortho"), Text(torch.randn(2, 3, IN, dtype=torch.float64))
    layer(text.value)  # the first call of all finds out whether the layer writes to its input
    calls.clear()
    for _ in range(2):
        with overlaid([Overlay(layer, a, 2)], text=text):
            first, again = layer(text.value), layer(text.value)
            assert len(calls) == 1 and torch.equal(first, again)
    with overlaid([Overlay(layer, a, 2)], text=text):
        layer(text.value.clone())  # any other tensor
    assert len(calls) == 2
    torch.testing.assert_close(first, add_low_rank(own(text.value), text.value, *a.factors(), 2, 2))


@pytest.mark.parametrize("text_first", [True, False])
def test_a_checkpointed_block_that_calls_a_layer_on_the_text_and_on_more_gives_each_call_its_own(layer, text_first):
    text = Text(torch.randn(2, 3, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))
    x = torch.randn(2, 3, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5), requires_grad=True)
    layer.forward, a = Frozen(layer).forward, adapter("ortho")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, text):
            first, second = (text, x) if text_first else (x, text)
            return self.layer(first) * 2 + self.layer(second).sin()

    plain, block = Block(), Block()
    block.forward = Checkpointed(block).forward
    found = []
    for one in (plain, block, block):  # on the first call a block finds out what it overwrites
        with overlaid([Overlay(layer, a, 3)], text=text):
            found.append(gradients(lambda x, one=one: one(x, text.value), x, leaves_of(a)))
    for others in found[1:]:
        for ours, wanted in zip(others, found[0]):
            torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


def test_a_memo_finds_equal_texts_and_none_that_was_written_to():
    memo, given = TextMemo(), torch.randn(2, 3)
    with torch.inference_mode():
        of_a_node = given.clone()
    cpu, text = given.device, memo.find(of_a_node, given.device, torch.float32)
    assert memo.find(given, cpu, torch.float32) is text and memo.find(text.value, cpu, torch.float32) is text
    assert memo.find(given, cpu, torch.float16) is not text and memo.find(given + 1, cpu, torch.float32) is not text
    assert memo.find(given, cpu, torch.float32) is text
    text.value += 3
    for now in (given, text.value.clone(), text.value):  # what layers keep of it is of what it was
        assert memo.find(now, cpu, torch.float32) is not text
    for i in range(5):
        memo.find(given * (i + 2), cpu, torch.float32)
    assert len(memo.texts) == 4


def test_gradients_of_layers_whose_inputs_differ_in_dtype_are_each_its_own():
    layers = [nn.Linear(IN, OUT).to(dtype).requires_grad_(False) for dtype in (torch.float32, torch.bfloat16)]
    adapters = [adapter("lora", i) for i in range(2)]
    leaves = leaves_of(*(a for a in adapters if a.module.float()))
    inputs = [torch.randn(4, IN, generator=torch.Generator().manual_seed(3)).to(layer.weight.dtype) for layer in layers]
    with overlaid(Overlay(layer, a, RANK, 0) for layer, a in zip(layers, adapters)):
        ours = torch.autograd.grad(sum(layer(x).float().square().sum() for layer, x in zip(layers, inputs)), leaves)
    plain = sum(
        add_low_rank(layer.forward(x), x, *(f.to(x.dtype) for f in a.factors()), RANK, a.group, 0)
        .float()
        .square()
        .sum()
        for layer, a, x in zip(layers, adapters, inputs)
    )
    for one, other in zip(ours, torch.autograd.grad(plain, leaves)):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()))


@pytest.mark.parametrize("stands_in", ["adapters", "nothing"])
def test_a_layer_that_writes_to_its_input_gets_a_copy_at_every_call(layer, stands_in):
    """Autograd may have kept the input for the backward pass of another layer."""
    own = layer.forward
    layer.forward = lambda x: own(x.clamp_(-0.5, 0.5) if not torch.is_grad_enabled() else x.clamp(-0.5, 0.5))
    layer.forward = Frozen(layer, lambda *_: nullcontext((layer.weight, layer.bias))).forward
    overlays = [Overlay(layer, adapter("ortho"), 2)] if stands_in == "adapters" else []
    for _ in range(2):
        x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
        before = x.detach().clone()
        with overlaid(overlays):
            output = (x * x).sum() + layer(x).sum()
        gradient = torch.autograd.grad(output, x)[0]
        assert torch.equal(x, before)
        down = layer.weight.sum(0)
        if overlays:
            up, factor = overlays[0].adapter.factors()
            down = down + (up[:, :4] @ factor[:4]).sum(0)
        torch.testing.assert_close(gradient, 2 * x + down)


def test_frozen_layer_called_with_more_than_a_tensor_is_the_layer_itself(comfy):
    import comfy.ops

    from tlora_core.hosts.comfy.model.layers import fetched

    layer = comfy.ops.manual_cast.Embedding(5, 3)
    nn.init.normal_(layer.weight)
    tokens = torch.tensor([[1, 4]])
    wanted = layer(tokens, out_dtype=torch.float16)
    shown = Frozen(layer, fetched).forward(tokens, out_dtype=torch.float16)
    assert shown.dtype == torch.float16 and torch.equal(shown, wanted)
