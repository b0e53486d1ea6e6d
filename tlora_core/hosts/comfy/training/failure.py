"""What is done about an evaluation or a step that fails: nothing of it stays in memory."""

import gc
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import TypeVar

import comfy.model_management
import torch
from comfy.model_management import InterruptProcessingException

from ....errors import TLoRAError
from ....files.untrusted import one_line

_Result = TypeVar("_Result")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the host takes `error` for an out-of-memory error. ComfyUI 0.16.3 knows one class of them, later versions
    know several."""
    judge = getattr(comfy.model_management, "is_oom", None)
    return judge(error) if judge is not None else isinstance(error, comfy.model_management.OOM_EXCEPTION)


def forget_failed_step(error: BaseException) -> None:
    """Frees what a failed step still holds, while its error is being handled. The traceback stays, without variables.

    The variables of the functions that failed hold the step's tensors for as long as the error lives. Autograd holds
    others: a backward pass that fails on the CPU leaves its nodes in the thread's queue until the next backward pass,
    and the graph with them.
    """
    failed: BaseException | None = error
    while failed is not None:
        for frame, _ in traceback.walk_tb(failed.__traceback__):
            with suppress(RuntimeError):  # of one that is still running
                _empty_closure(frame)
                frame.clear()
                _ = frame.f_locals  # up to 3.12, Python keeps what the last look at them gave; this one renews it
        failed = failed.__cause__ or failed.__context__
    with torch.inference_mode(False), torch.enable_grad():
        torch.ones((), requires_grad=True).mul(1).backward()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def _empty_closure(frame: FrameType) -> None:
    """PyTorch calls a module that has hooks in a function made for the call. The traceback keeps that function, whose
    cells hold what stands in for the module's forward."""
    if frame.f_code.co_name == "inner" and frame.f_code.co_filename == torch.nn.modules.module.__file__:
        for function in gc.get_referents(frame):
            for cell in getattr(function, "__closure__", None) or ():
                cell.cell_contents = None


def failure_words(error: Exception) -> str:
    """What an error says, on one line; with its class where that is the better half."""
    words = one_line(error)
    return words if type(error) is RuntimeError and words else f"{type(error).__name__}: {words}".removesuffix(": ")


def at_smallest(sides: Sequence[int], run: Callable[[int], _Result]) -> _Result:
    """What `run` gives for the first of `sides`, those of small latents, that the model can be evaluated on: some
    models fail below a size of their own. Raises the error at the last side."""
    for side in sides[:-1]:
        try:
            return run(side)
        except (TLoRAError, InterruptProcessingException):
            raise
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            forget_failed_step(error)
    return run(sides[-1])
