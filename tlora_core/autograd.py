"""Backward passes of frozen layers and of the adapters on them, written out.

Left to itself, autograd keeps more than it needs: of a layer that casts its weight (fp8 and quantised models, and models
that the host streams from memory) the cast copy, of an adapter every factor it was made of. On some hosts that copy may even
have been overwritten by the time the backward pass comes to it. So here a frozen layer saves nothing and fetches its weight
anew for the backward pass, and an adapter saves its layer's input, which layers side by side share, and r numbers a token.
"""
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.grad
from torch import Tensor, nn

from .adapters import Adapter
from .products import Group, Kept, Part, group_of

_INPUTS_KEPT = 4  # captions whose turn comes again and again


class Frozen:
    """Stands in for the forward of a layer that is not trained and is called with one tensor; a call with more, as of an embedding
    in another dtype, is the layer's own.

    fetch: gives the layer's weight and bias in the dtype and on the device of a tensor, for the length of a block; None for a
        layer whose weight may be kept from the forward pass to the backward pass, as autograd does.
    keeps_output: the layer's input comes back at every step, as the text does: what the layer makes of it is kept.
    """

    def __init__(self, layer: nn.Module, fetch: Callable[[nn.Module, Tensor], AbstractContextManager] | None = None,
                 keeps_output: bool = False):
        self.layer, self.fetch, self.keeps_output = layer, fetch, keeps_output
        self.run = layer.forward
        self._kept: list[Kept] = []

    def __call__(self, x: Tensor, **options) -> Tensor:
        if options or self.fetch is None or not (x.requires_grad and torch.is_grad_enabled()):
            return self.run(x, **options)
        if isinstance(self.layer, nn.Linear) or _is_simple_convolution(self.layer):
            return _FrozenLayer.apply(x, self)
        return _Rerun.apply(x, self.run)

    def kept(self, x: Tensor) -> Kept | None:
        """What is kept of this input; None where nothing is."""
        if not self.keeps_output or x.requires_grad:
            return None
        known = next((kept for kept in self._kept if kept.is_of(x)), None)
        if known is None:
            known = Kept(x, self.run(x))
            self._kept = [known, *(kept for kept in self._kept[:_INPUTS_KEPT - 1] if kept.is_alive)]
        return known

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of this shape, from that of the layer's output."""
        with self.fetch(self.layer, gradient) if self.fetch is not None else nullcontext((self.layer.weight, None)) as (weight, _):
            if weight.dim() == 2:  # also of the host's quantised layers, which are no torch.nn.Linear
                scale = getattr(self.layer, "pre_quant_scale", None)  # some of which scale their input first
                return gradient @ weight if scale is None else gradient @ weight * scale.to(gradient)
            back = _CONVOLUTIONS[weight.dim() - 2]
            return back(shape, weight, gradient, self.layer.stride, self.layer.padding, self.layer.dilation, self.layer.groups)


_CONVOLUTIONS = {1: torch.nn.grad.conv1d_input, 2: torch.nn.grad.conv2d_input, 3: torch.nn.grad.conv3d_input}


def _is_simple_convolution(layer: nn.Module) -> bool:
    return (isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str))


class _FrozenLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, frozen: Frozen) -> Tensor:
        ctx.frozen, ctx.shape = frozen, x.shape
        return frozen.run(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.frozen.input_gradient(gradient, ctx.shape), None


class _Rerun(torch.autograd.Function):
    """For layers without a backward pass of their own here, such as norms: runs them again."""

    @staticmethod
    def forward(ctx, x: Tensor, run) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(ctx.run(x), x, gradient)[0], None


class Evaluation:
    """The adapters of one evaluation of a model, those of one kind, shape and rank together.

    There are hundreds, each with a few small products, so what comes before and after these is done for a group at a time: the
    factors are made when the first layer asks for one, and the gradients of the parameters after the last layer's backward pass.
    For that autograd sees one function of all parameters; what it gives, `token`, is an input of every layer.
    """

    def __init__(self):
        self.parts: list[Part] = []
        self._places: dict[torch.dtype, dict[Adapter, tuple[Group, int]]] = {}
        self._token: Tensor | None = None

    @property
    def token(self) -> Tensor:
        if self._token is None:
            self._token = _Gradients.apply(self, *self.parameters())
        return self._token

    def parameters(self) -> list[Tensor]:
        return [p for part in self.parts for p in part.adapter.parameters()]

    @contextmanager
    def without_gradients(self):
        """Within the block a layer's backward pass is not followed by that of `token`, as other layers are yet to come."""
        token, self._token = self._token, torch.zeros(0, requires_grad=True)
        try:
            yield
        finally:
            self._token = token

    def place(self, adapter: Adapter, dtype: torch.dtype) -> tuple["Group", int]:
        """Where to find the adapter's factors in this dtype: its group, and its number there."""
        if dtype not in self._places:
            members = defaultdict(dict)
            for part in self.parts:
                members[type(part.adapter), part.adapter.A.shape, part.adapter.B.shape, part.columns][part.adapter] = None
            groups = [group_of(list(adapters), key[-1], dtype) for key, adapters in members.items()]
            self._places[dtype] = {a: (group, i) for group in groups for i, a in enumerate(group.adapters)}
        return self._places[dtype][adapter]

    def forget(self) -> None:
        """The parameters are about to change."""
        self._places, self._token = {}, None

    def groups(self) -> list["Group"]:
        return list({id(group): group for places in self._places.values() for group, _ in places.values()}.values())


class _Gradients(torch.autograd.Function):
    """What autograd knows of the adapters' parameters: that something depends on them."""

    @staticmethod
    def forward(ctx, evaluation: Evaluation, *parameters: Tensor) -> Tensor:
        ctx.evaluation = evaluation
        return torch.zeros(0)

    @staticmethod
    def backward(ctx, _):
        of_adapters: dict[Adapter, tuple[Tensor, ...]] = {}
        for group in ctx.evaluation.groups():  # an adapter is in one for each dtype of its layers' inputs
            for adapter, found in group.gradients().items():
                before = of_adapters.get(adapter)
                of_adapters[adapter] = found if before is None else tuple(a + b for a, b in zip(before, found))
        ctx.evaluation.forget()
        return None, *(g for part in ctx.evaluation.parts
                       for g in of_adapters.get(part.adapter) or [None] * len(list(part.adapter.parameters())))


class Trained:
    """The forward of a layer with adapters in training: forward(x) + up M_t down x for each part, as `masking.add_low_rank`
    gives it. `forward` is the layer's own, or whatever stands in for it."""

    def __init__(self, forward: Callable[[Tensor], Tensor], parts: Sequence[Part], evaluation: Evaluation):
        self.forward, self.parts, self.evaluation = forward, parts, evaluation
        self.frozen = forward if isinstance(forward, Frozen) else None
        evaluation.parts += parts

    def __call__(self, x: Tensor) -> Tensor:
        return _AddAdapters.apply(x, None if self.frozen else self.forward(x), self.evaluation.token, self)


class _AddAdapters(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, base: Tensor | None, token: Tensor, layer: Trained) -> Tensor:
        kept = layer.frozen and layer.frozen.kept(x)
        if kept:
            output = kept.output.clone()
        else:
            output = layer.frozen.run(x) if base is None else base.clone()
        tokens, rows = x.flatten(0, -2), output.view(-1, output.shape[-1])
        places = [layer.evaluation.place(part.adapter, x.dtype) for part in layer.parts]
        saved = [group.add(i, group.rows_of(rows, part.row), tokens, kept, part.mask)
                 for part, (group, i) in zip(layer.parts, places)]
        ctx.layer, ctx.places = layer, places
        ctx.save_for_backward(x, *saved)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, *saved = ctx.saved_tensors
        layer, tokens, rows = ctx.layer, x.flatten(0, -2), gradient.flatten(0, -2)
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = layer.frozen.input_gradient(rows, tokens.shape) if layer.frozen else torch.zeros_like(tokens)
        for part, (group, i), hidden in zip(layer.parts, ctx.places, saved):
            group.back(i, group.rows_of(rows, part.row), tokens, hidden, part.mask, of_input)
        of_input = None if of_input is None else of_input.view(x.shape)
        return of_input, gradient if ctx.needs_input_grad[1] else None, None, None
