"""Which layers of a T-LoRA the host calls, and where: seen once, and told.

An adapter acts only where the model calls its layer. A file's layer may lie where the model does not come by: one that
the host computes before the sampling, or not at all with these inputs, or by a path of its own that uses the weight and
leaves the layer out. None of that may be silent.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

NAMED = 3  # how many layers a sentence names


class Reach:
    """What is known of one T-LoRA's layers. tell: gets each sentence besides the log.

    outside: paths of the layers that the host has called while it prepared the conditioning. unreached: those that it
    has called neither there nor in the first evaluation; None before that.
    """

    def __init__(self, tell: Callable[[str], object] | None = None):
        self.tell = tell
        self.outside: set[str] = set()
        self.unreached: list[str] | None = None

    def preparing(self, layers: Mapping[str, nn.Module]) -> AbstractContextManager:
        """Around what the host computes before the first evaluation. layers: by path."""
        return nullcontext() if self.unreached is not None else self._preparing(layers)

    def evaluating(self, layers: Mapping[str, nn.Module]) -> AbstractContextManager:
        """Around an evaluation of the model; only the first one costs anything."""
        return nullcontext() if self.unreached is not None else self._evaluating(layers)

    @contextmanager
    def _preparing(self, layers: Mapping[str, nn.Module]):
        with _calls(layers) as called:
            yield
        self.outside |= called

    @contextmanager
    def _evaluating(self, layers: Mapping[str, nn.Module]):
        with _calls(layers) as called:
            yield
        self.unreached = [path for path in layers if path not in called | self.outside]
        self.judge(layers)

    def judge(self, layers: Mapping[str, nn.Module]) -> None:
        """After the first evaluation."""
        if self.outside:
            self._say(logging.INFO, _SENTENCE_OUTSIDE.format(naming(self.outside)))
        if self.unreached:
            self._say(logging.WARNING, _SENTENCE_UNREACHED.format(naming(self.unreached)))

    def _say(self, level: int, sentence: str) -> None:
        logging.log(level, "[T-LoRA] %s", sentence)
        if self.tell is not None:
            self.tell(sentence)


@contextmanager
def _calls(layers: Mapping[str, nn.Module]):
    """Gives a set, which gets the paths of the layers that are called within the block."""
    called: set[str] = set()
    # Hooks and not forwards: those tell the ways of putting adapters on what stands in for a layer.
    hooks = [layer.register_forward_pre_hook(_noting(path, called)) for path, layer in layers.items()]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _noting(path: str, called: set[str]) -> Callable[..., None]:
    return lambda *_: called.add(path)


def naming(paths: Iterable[str]) -> str:
    """The first few of the layers, and how many more there are."""
    each = sorted(paths)
    more = f" and {len(each) - NAMED} more" if len(each) > NAMED else ""
    return f"{len(each)} layer{'s' if len(each) > 1 else ''} ({', '.join(each[:NAMED])}{more})"


_SENTENCE_OUTSIDE = (
    "Full rank at every step for {}: the model uses them once before the sampling, on the text or a picture, where no "
    "noise level is known."
)
_SENTENCE_UNREACHED = (
    "No effect from {}: the model did not call them in the first evaluation. They may belong to an input that this "
    "workflow does not have; otherwise another node or this version of ComfyUI computes them in its own way."
)
