"""A T-LoRA's part in a sampling outside of the model's evaluations.

Some models have layers that the host runs when it prepares the conditioning (`extra_conds`), for example Anima's text
adapter, the connectors of LTX's audio models and MiniMax's token refiner. No noise level is known there, and the
result serves all steps, so adapters on such layers have their full rank. Which layers these are is not asked: within
`extra_conds` all have it, and those that only evaluations use are not called there.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from .model.bypasses import without_compiler

_EXTRA_CONDS = "extra_conds"
_ABSENT = object()


class WholeSampling:
    """The OUTER_SAMPLE wrapper of one T-LoRA. full_rank: puts it on with its full rank on a patcher's model within a
    block."""

    changes_result = False  # for the fingerprint of a training, which has no such sampling

    def __init__(self, full_rank: Callable[[ModelPatcher], AbstractContextManager]):
        self.full_rank = full_rank
        self._running: list[ExitStack] = []  # one for each sampling; they may nest

    def __call__(self, executor, *args, **kwargs):
        with without_compiler(), ExitStack() as stack:
            self._running.append(stack)
            stack.callback(self._running.pop)
            return executor(*args, **kwargs)

    def begin(self, patcher: ModelPatcher) -> None:
        """The host's ON_PRE_RUN callback: after it has loaded the model, which may put methods of other nodes on it,
        and before it prepares the conditioning."""
        if self._running:
            self._running[-1].enter_context(self.preparing(patcher))

    @contextmanager
    def preparing(self, patcher: ModelPatcher):
        """Within the block, the model's `extra_conds` runs with the T-LoRA."""
        methods = vars(patcher.model)
        own, before = patcher.model.extra_conds, methods.get(_EXTRA_CONDS, _ABSENT)

        def extra_conds(*args, **kwargs):
            with self.full_rank(patcher):
                return own(*args, **kwargs)

        methods[_EXTRA_CONDS] = extra_conds
        try:
            yield
        finally:
            if before is _ABSENT:
                del methods[_EXTRA_CONDS]
            else:
                methods[_EXTRA_CONDS] = before

    def put_on(self, model: ModelPatcher, key: str) -> None:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, self)
        model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, key, self.begin)


@contextmanager
def preparing(model: ModelPatcher):
    """Within the block, the `extra_conds` of `model` runs with all its T-LoRAs, as in a sampling."""
    with ExitStack() as stack:
        for each in (w for keyed in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).values() for w in keyed):
            if isinstance(each, WholeSampling):
                stack.enter_context(each.preparing(model))
        yield
