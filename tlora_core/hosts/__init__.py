"""Programs in which a T-LoRA is trained or applied: `diffusers`, and `comfy` for ComfyUI.

Imports all other folders; only `nodes/` and the package itself import it.
"""
