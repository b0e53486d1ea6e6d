"""ComfyUI. Only this folder, `nodes/` and `tiny/comfy.py` import it.

From below: `model`, `page`; `sampling`, `draw`, `files`; `training`; `routes`. Each imports only those before it.
"""
