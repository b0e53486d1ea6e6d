"""Which of a node's inputs are widgets, and which saved value belongs to which of them.

The interface saves widget values as a bare list in the order in which it made the widgets, with extra entries for the
widgets it adds on its own ("control after generate" next to a seed, the upload button below a file list).
"""

from __future__ import annotations

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "BOUNDING_BOX", "CURVE", "RANGE", "IMAGECOMPARE"}
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
SEED_NAMES = ("seed", "noise_seed")
UPLOAD_OPTIONS = ("image_upload", "animated_image_upload", "video_upload", "audio_upload", "file_upload")
GROUPS = ("required", "optional")


def declared_inputs(info: dict) -> set[str]:
    """The names of a class's inputs, hidden ones left out."""
    return {name for group in GROUPS for name in info.get("input", {}).get(group) or {}}


def widget_values(node: dict, info: dict) -> dict[str, object]:
    """The value of every widget of a saved node, by input name; defaults where the file is too old to have one."""
    saved = node.get("widgets_values") or []
    reader = _DictReader(node, saved) if isinstance(saved, dict) else _ListReader(node, saved)
    for group in GROUPS:
        inputs = info.get("input", {}).get(group) or {}
        for name, spec in inputs.items():
            reader.take(name, spec)
        reader.skip_upload(inputs)
    return reader.values


class _Reader:
    """Walks a class's inputs in order and collects the widgets' values."""

    def __init__(self, node: dict):
        self.values: dict[str, object] = {}
        self._marked = {slot["name"] for slot in node.get("inputs") or [] if slot.get("widget")}

    def take(self, name: str, spec: list) -> None:
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        if not self._is_widget(name, kind, options):
            return
        value = self._next(name)
        if value is None:
            value = _default(kind, options)
        if value is not None:
            self.values[name] = value
        if kind == DYNAMIC_COMBO:
            self._take_branch(name, value, options)
        if options.get("control_after_generate", kind == "INT" and name.split(".")[-1] in SEED_NAMES):
            self._skip_control(is_combo=kind == "COMBO" or isinstance(kind, list))

    def _is_widget(self, name: str, kind: object, options: dict) -> bool:
        if options.get("forceInput") or options.get("defaultInput"):
            return False
        if isinstance(kind, list) or kind in WIDGET_TYPES or kind == DYNAMIC_COMBO:
            return True
        return bool(options.get("widgetType")) or name in self._marked

    def _take_branch(self, name: str, chosen: object, options: dict) -> None:
        """A dynamic combo's choice decides which further inputs there are, named parent.child."""
        for option in options.get("options", []):
            if option["key"] == chosen:
                for group in GROUPS:
                    for child, spec in (option["inputs"].get(group) or {}).items():
                        self.take(f"{name}.{child}", spec)

    def _next(self, name: str) -> object:
        raise NotImplementedError

    def _skip_control(self, is_combo: bool) -> None:
        pass

    def skip_upload(self, inputs: dict) -> None:
        pass


class _DictReader(_Reader):
    def __init__(self, node: dict, saved: dict):
        super().__init__(node)
        self._saved = saved

    def _next(self, name: str) -> object:
        return self._saved.get(name)


class _ListReader(_Reader):
    def __init__(self, node: dict, saved: list):
        super().__init__(node)
        self._left = list(saved)

    def _next(self, name: str) -> object:
        return self._left.pop(0) if self._left else None

    def _skip_control(self, is_combo: bool) -> None:
        # Files written by scripts often lack the entry, so look instead of counting.
        if self._left and self._left[0] in CONTROL_VALUES:
            self._left.pop(0)
            if is_combo and self._left and isinstance(self._left[0], str):
                self._left.pop(0)

    def skip_upload(self, inputs: dict) -> None:
        """The upload button comes after the last required widget and saves the name of the widget it fills."""
        uploads = any(
            len(spec) > 1 and any(spec[1].get(option) for option in UPLOAD_OPTIONS) for spec in inputs.values()
        )
        if uploads and self._left and (self._left[0] is None or self._left[0] in inputs):
            self._left.pop(0)


def _default(kind: object, options: dict) -> object:
    if options.get("default") is not None:
        return options["default"]
    if options.get("socketless"):
        # A widget for display only; the server wants some value for it all the same.
        return ""
    choices = kind if isinstance(kind, list) else options.get("options") or [None]
    first = choices[0] if choices else None
    return first["key"] if isinstance(first, dict) else first
