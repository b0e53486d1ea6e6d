"""ComfyUI-T-LoRA: teach a diffusion model a new object from a single image."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
