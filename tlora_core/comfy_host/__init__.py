"""The one place that touches ComfyUI. Nothing outside this package and `nodes/` imports the host."""
