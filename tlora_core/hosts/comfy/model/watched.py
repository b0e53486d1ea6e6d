"""What a model's linear layers do, seen in its evaluation: which give queries, keys and values to an attention over the
picture, and which take back what it gives.

Layers have no common names, and names of new models are known to nobody. So the model is evaluated on two small noisy
latents. Three things are seen:

- Which tokens belong to the picture: those that differ between the two. For that, attention is kept from mixing
  tokens: it gives back the queries. An attention is over the picture if some of its queries are of the picture.
- Which rows of which layer become its queries, keys and values: each linear layer's output is a new leaf of autograd,
  and the gradient of the queries at a leaf is other than zero in just these rows, whatever norms and rotations lie
  between.
- Which layer takes back what it gives: attention's output is a leaf, too, from which that layer's input comes. A layer
  that takes back text alone is none of the picture's.

The same leaves tell the feed-forward layers of a block: one whose input comes from another layer of the block alone,
and that other layer.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

ROLES = QUERY, KEY, VALUE, OUTPUT, FEED_FORWARD = "query", "key", "value", "output", "feed-forward"
_PROJECTIONS = QUERY, KEY, VALUE
_ALIKE = 1e-5  # part of the usual size of a number by which two must differ to count as different


@dataclass(frozen=True)
class Part:
    """`rows` rows from `row` on of the linear layer at `path`, and what they do, one of ROLES."""

    path: str
    row: int
    rows: int
    role: str


@dataclass
class Watched:
    """parts: of the attentions over the picture, and of the feed-forward layers in their blocks. unreached: the modules
    whose attention over the picture gets queries, keys or values from no linear layer, by path."""

    parts: list[Part] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)


def watched(
    network: nn.Module,
    linear: Mapping[str, nn.Module],
    blocks: Iterable[nn.Module],
    evaluate: Callable[[int], object],
    feed_forward: bool = True,
) -> Watched:
    """What the model's linear layers do, from two evaluations; with the feed-forward layers from four.

    network: the diffusion model, ready for autograd, whose attention is PyTorch's. linear: its linear layers by module
    path. blocks: those that it runs one after the other. evaluate: evaluates the model on a small noisy latent, one for
    0 and another for 1.
    """
    blocks = list(blocks)
    first = _evaluated(network, linear, blocks, lambda: evaluate(0), apart=True, leaves=True)
    second = _evaluated(network, linear, blocks, lambda: evaluate(1), apart=True)
    pairs = zip_longest(first.attentions, (attention.queries for attention in second.attentions))
    of_picture = [other is None or _differ(one.queries, other) for one, other in pairs if one is not None]
    own = {path for path in first.inputs if _differ_any(first.inputs[path], second.inputs.get(path, []))}
    if not feed_forward:
        return _Reading(network, linear, first, of_picture, own, set()).result()
    mixed = [_evaluated(network, linear, blocks, lambda n=n: evaluate(n), apart=False).inputs for n in (0, 1)]
    reached = {path for path in mixed[0] if _differ_any(mixed[0][path], mixed[1].get(path, []))}
    return _Reading(network, linear, first, of_picture, own, reached).result()


@dataclass
class _Attention:
    """One call. place: the path of the module that makes it. queries: a number for each token. width: how many numbers
    it gives a token. sources: for each role, the layers' rows that it comes from, bool [rows], by path."""

    place: str
    queries: Tensor
    width: int
    sources: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass
class _Seen:
    """inputs: for each linear layer's call, a number for each token. origins: for each call, the leaves that its input
    comes from: paths of layers, numbers of attentions, or None for anything else."""

    inputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    origins: dict[str, list[set]] = field(default_factory=lambda: defaultdict(list))
    attentions: list[_Attention] = field(default_factory=list)


class _Attentions(TorchFunctionMode):
    """Sees every attention. apart: each gives back its queries, so that tokens do not mix."""

    def __init__(self, seen: _Seen, places: list[str], leaves: "_Leaves | None", apart: bool):
        super().__init__()
        self.seen, self.places, self.leaves, self.apart = seen, places, leaves, apart

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attention(func, *args, **(kwargs or {}))

    def _attention(self, func, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        """query, key, value: [..., heads, tokens, features]."""
        heads = query.shape[-3] if query.ndim > 3 else 1
        tokens = query.movedim(-3, -2).flatten(-2) if query.ndim > 3 else query
        attention = _Attention(self.places[-1], _numbers(tokens), heads * value.shape[-1])
        if self.leaves is not None:
            attention.sources = {
                role: self.leaves.rows_of(tensor) for role, tensor in zip(_PROJECTIONS, (query, key, value))
            }
        if key.shape[-2] == 0:  # nothing to look at, as with an empty prompt of a second kind
            return func(query, key, value, *args, **kwargs)
        self.seen.attentions.append(attention)
        output = _queries_like(query, value) if self.apart else func(query, key, value, *args, **kwargs)
        return output if self.leaves is None else self.leaves.cut(output, len(self.seen.attentions) - 1)


class _Leaves:
    """Cuts autograd's graph where layers give their output, and finds what a tensor comes from."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Tensor, object]] = {}

    def cut(self, tensor: Tensor, origin: object) -> Tensor:
        """The same numbers as a new leaf; not that itself, which blocks may not write to."""
        leaf = tensor.detach().requires_grad_()
        self._of[id(leaf)] = leaf, origin
        return leaf.clone()

    def of(self, tensor: Tensor) -> list[tuple[Tensor, object]]:
        """The leaves that a tensor comes from, and what they are."""
        found, seen, left = [], set(), [tensor.grad_fn]
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if (leaf := getattr(node, "variable", None)) is not None and id(leaf) in self._of:
                found.append(self._of[id(leaf)])
            left += [each for each, _ in node.next_functions]
        return found

    def origins(self, tensor: Tensor) -> set:
        return {origin for _, origin in self.of(tensor)}

    def rows_of(self, tensor: Tensor) -> dict[str, Tensor]:
        """Which rows of which layers it comes from, bool [rows] by path."""
        layers = [(leaf, origin) for leaf, origin in self.of(tensor) if isinstance(origin, str)]
        if not layers:
            return {}
        cotangent = torch.randn(tensor.shape, device=tensor.device).to(tensor.dtype)
        gradients = torch.autograd.grad(
            tensor, [leaf for leaf, _ in layers], cotangent, retain_graph=True, allow_unused=True
        )
        rows: dict[str, Tensor] = {}
        for (_, path), gradient in zip(layers, gradients):
            if gradient is not None and (on := gradient.flatten(0, -2).ne(0).any(0).cpu()).any():
                rows[path] = rows.get(path, on) | on
        return rows

    def forget(self) -> None:
        self._of.clear()


def _evaluated(
    network: nn.Module,
    linear: Mapping[str, nn.Module],
    blocks: Iterable[nn.Module],
    evaluate: Callable[[], object],
    apart: bool,
    leaves: bool = False,
) -> _Seen:
    """One evaluation, seen."""
    seen, places, cutting = _Seen(), [""], _Leaves() if leaves else None
    with ExitStack() as hooks:
        if cutting is not None:
            for path, module in network.named_modules():
                _track(module, path, places, hooks)
            _cut_between(network, linear, blocks, cutting, hooks)
        for path, layer in linear.items():
            _watch_layer(layer, path, seen, cutting, hooks)
        with _Attentions(seen, places, cutting, apart):
            evaluate()
    return seen


def _track(module: nn.Module, path: str, places: list[str], hooks: ExitStack) -> None:
    """Keeps the paths of the modules that are running, the innermost last."""
    hooks.callback(module.register_forward_pre_hook(lambda *_: places.append(path)).remove)
    hooks.callback(module.register_forward_hook(lambda *_: (places.pop(), None)[1], always_call=True).remove)


def _watch_layer(layer: nn.Module, path: str, seen: _Seen, leaves: _Leaves | None, hooks: ExitStack) -> None:
    def before(_, args):
        seen.inputs[path].append(_numbers(args[0]))
        if leaves is not None:
            seen.origins[path].append(leaves.origins(args[0]))

    hooks.callback(layer.register_forward_pre_hook(before).remove)
    if leaves is not None:
        cut = layer.register_forward_hook(lambda _, args, output: leaves.cut(output, path))
        hooks.callback(cut.remove)


def _cut_between(
    network: nn.Module, linear: Mapping[str, nn.Module], blocks: Iterable[nn.Module], leaves: _Leaves, hooks: ExitStack
) -> None:
    """Cuts at what is no linear layer, too: convolutions, and where blocks begin. It keeps the graph, and so what it
    holds in memory, to one block."""

    def begins(_, args, kwargs):
        leaves.forget()
        fresh = {name: _cut_input(each, leaves) for name, each in kwargs.items()}
        return tuple(_cut_input(each, leaves) for each in args), fresh

    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            handle = module.register_forward_hook(lambda _, args, output: leaves.cut(output, None))
            hooks.callback(handle.remove)
    inside = {id(each) for each in linear.values()}
    for block in blocks:
        if id(block) not in inside:
            hooks.callback(block.register_forward_pre_hook(begins, with_kwargs=True).remove)


def _cut_input(value, leaves: _Leaves):
    return leaves.cut(value, None) if isinstance(value, Tensor) and value.requires_grad else value


class _Reading:
    """Puts together what was seen.

    of_picture: of each attention, which of its queries' tokens are of the picture. own: the layers that read tokens of
    the picture. reached: those whose input the picture reaches, also by attention.
    """

    def __init__(
        self,
        network: nn.Module,
        linear: Mapping[str, nn.Module],
        seen: _Seen,
        of_picture: list[bool],
        own: set[str],
        reached: set[str],
    ):
        self.linear, self.seen, self.of_picture, self.own, self.reached = linear, seen, of_picture, own, reached
        lists = [path for path, module in network.named_modules() if isinstance(module, nn.ModuleList | nn.ModuleDict)]
        self.blocks = re.compile(rf"(?:{'|'.join(map(re.escape, lists))})\.[^.]+(?=\.)")

    def result(self) -> Watched:
        projections, unreached = self._projections()
        outputs = self._outputs()
        parts = [part for path in projections for part in self._parts(path, projections[path])]
        taken = {part.path for part in parts}
        parts += [Part(path, 0, self._rows(path), OUTPUT) for path in outputs if path not in taken]
        parts += self._feed_forward(parts)
        order = {path: index for index, path in enumerate(self.linear)}
        return Watched(sorted(parts, key=lambda part: (order[part.path], part.row)), unreached)

    def _rows(self, path: str) -> int:
        return int(self.linear[path].out_features)

    def _projections(self) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
        """The rows of each role, by layer; and where an attention over the picture gets one from no layer."""
        rows: dict[str, dict[str, Tensor]] = defaultdict(dict)
        unreached = []
        for attention, is_of_picture in zip(self.seen.attentions, self.of_picture):
            if not is_of_picture:
                continue
            for role, sources in attention.sources.items():
                for path, on in sources.items():
                    rows[path][role] = rows[path].get(role, on) | on
            if not all(attention.sources.values()) and attention.place not in unreached:
                unreached.append(attention.place)
        return rows, unreached

    def _parts(self, path: str, rows: dict[str, Tensor]) -> list[Part]:
        """The roles' rows as ranges, or the layer as a whole where they lie between one another."""
        ranges = {role: (int(on.nonzero()[0]), int(on.nonzero()[-1]) + 1) for role, on in rows.items()}
        bounds = sorted(ranges.items(), key=lambda each: each[1])
        apart = all(before[1][1] <= after[1][0] for before, after in zip(bounds, bounds[1:]))
        if apart:
            return [Part(path, start, end - start, role) for role, (start, end) in bounds]
        start, end = min(r[0] for r in ranges.values()), max(r[1] for r in ranges.values())
        return [Part(path, start, end - start, next(role for role in _PROJECTIONS if role in rows))]

    def _outputs(self) -> list[str]:
        """The layers whose input is an attention's output and nothing wider: FLUX's single blocks have one that takes
        the feed-forward's numbers beside it, and belongs to that."""
        return [
            path
            for path, calls in self.seen.origins.items()
            if path in self.own and any(self._is_output(path, origins) for origins in calls)
        ]

    def _is_output(self, path: str, origins: set) -> bool:
        given = [self.seen.attentions[i] for i in origins if isinstance(i, int) and self.of_picture[i]]
        return bool(given) and None not in origins and self.linear[path].in_features <= max(a.width for a in given)

    def _feed_forward(self, attention: list[Part]) -> list[Part]:
        """Pairs of layers in the blocks of these: one whose input comes from other layers of its block alone, and
        those."""
        blocks = {self._block(part.path) for part in attention} - {""}
        streams = {part.path for part in attention if part.role == OUTPUT}  # what adds these up is the block's stream
        rows = Counter({part.path: 0 for part in attention})
        for part in attention:
            rows[part.path] = max(rows[part.path], part.row + part.rows)
        found: dict[str, int] = {}
        for path, calls in self.seen.origins.items():
            of_layers = {each for origins in calls for each in origins if isinstance(each, str)}
            if path in rows or not of_layers or of_layers & streams or any(None in origins for origins in calls):
                continue
            pair = {path, *of_layers}
            if pair <= self.reached and all(self._block(each) in blocks for each in pair):
                found |= {each: rows.get(each, 0) for each in pair if rows.get(each, 0) < self._rows(each)}
        return [Part(path, row, self._rows(path) - row, FEED_FORWARD) for path, row in found.items()]

    def _block(self, path: str) -> str:
        """The path of the outermost block that a layer lies in; "" for none."""
        found = self.blocks.match(path)
        return found[0] if found else ""


def _numbers(tokens: Tensor) -> Tensor:
    """A number for each token of [..., features], float32 on the CPU: a sum with fixed weights."""
    flat = tokens.detach().flatten(0, -2)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(flat.shape[-1], generator=generator).to(flat.device)
    return (flat.float() @ weights).cpu()


def _differ(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return True
    scale = first.square().mean().sqrt()
    return bool(((first - second).abs() > _ALIKE * scale).any())


def _differ_any(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) != len(second) or any(_differ(a, b) for a, b in zip(first, second))


def _queries_like(query: Tensor, value: Tensor) -> Tensor:
    """The queries, as wide as the values."""
    if query.shape[-1] == value.shape[-1]:
        return query.clone()
    return query.mean(-1, keepdim=True).expand(*query.shape[:-1], value.shape[-1]).clone()
