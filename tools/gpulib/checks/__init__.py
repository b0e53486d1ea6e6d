"""What is tried, by subject. Imported only by the process that runs it, once ComfyUI is there."""
