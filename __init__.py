"""ComfyUI-T-LoRA: teach a diffusion model a new object from a single image."""

from .tlora_core.hosts.comfy.model import internals

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls when it loads the pack."""
    internals.check()  # first, as what is missing may break an import

    from .nodes import comfy_entrypoint

    return await comfy_entrypoint()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
