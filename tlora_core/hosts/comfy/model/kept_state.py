"""What a model keeps from one evaluation to the next, such as the keys and values of a prompt.

It holds for the weights and adapters that it was computed with, and the host's models do not know of those. So an
evaluation with adapters starts with none of it, and leaves none of its own behind: what was there before is back
afterwards, as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .layers import diffusion_modules

# All such attributes in the host's models say so in their name.
_SAYS_SO = "cache"
# Wan Animate 2's results of its pose branch, which a node puts into the options of a sampling.
_OF_SAMPLING = "animate2_cache"
# By model: (path of a module, name of an attribute) of each.
_found: WeakKeyDictionary = WeakKeyDictionary()


@contextmanager
def nothing_kept(base) -> Iterator[None]:
    """Around one evaluation of `base`, the host's model: it keeps what it computes within the block and nothing
    else."""
    before = [(module, name, vars(module)[name]) for module, name in _kept(base.diffusion_model)]
    try:
        for module, name, value in before:
            setattr(module, name, _empty(value))  # a new one, so that what is there stays as it is
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def without_results(options: dict) -> dict:
    """`transformer_options` without what layers have computed earlier in the sampling."""
    return options if _OF_SAMPLING not in options else {k: v for k, v in options.items() if k != _OF_SAMPLING}


def _kept(network: nn.Module) -> list[tuple[nn.Module, str]]:
    modules = diffusion_modules(network)
    if network not in _found:
        _found[network] = [
            (path, name)
            for path, module in modules.items()
            for name in vars(module)
            if _SAYS_SO in name.lower() and _is_own(module, name)
        ]
    places = ((modules[path], name) for path, name in _found[network] if path in modules)
    return [(module, name) for module, name in places if name in vars(module)]


def _is_own(module: nn.Module, name: str) -> bool:
    """Whether the module's class has such an attribute. Others are of node packs that skip steps of a sampling, for
    example, and are left alone."""
    makers = (getattr(vars(each).get("__init__"), "__code__", None) for each in type(module).__mro__)
    return any(name in code.co_names for code in makers if code is not None)


def _empty(value: Any) -> Any:
    """The value of an attribute that keeps nothing: an empty container, off, or None. A number is a size, not something
    that is kept."""
    if isinstance(value, bool):
        return False
    if value is None or isinstance(value, int | float | str):
        return value
    return type(value)() if isinstance(value, list | dict | set | tuple) else None
