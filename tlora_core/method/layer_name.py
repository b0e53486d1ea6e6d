"""The name of an adapted layer."""


class LayerName(str):
    """A module's path, or "path@row" for some rows of a module that holds several projections.

    path: of the module. row: the layer's first row in the module. is_part: whether the name contains a row.
    """

    path: str
    row: int
    is_part: bool

    def __new__(cls, name: str) -> "LayerName":
        if isinstance(name, LayerName):
            return name
        made = super().__new__(cls, name)
        made.path, part, row = name.partition("@")
        made.is_part, made.row = bool(part), int(row) if row.isdecimal() else 0
        return made

    @classmethod
    def of_rows(cls, path: str, row: int) -> "LayerName":
        """The name of the layer in a module's rows from `row` on."""
        return cls(f"{path}@{row}")
