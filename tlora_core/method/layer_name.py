"""The name of a layer that an adapter belongs to."""


class LayerName(str):
    """A module's path, or "path@row" for some rows of a module that holds several projections.

    path: the module's. row: the first of the layer's rows in it. is_part: whether the name tells the row.
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
        """The layer that is the rows of a module from `row` on."""
        return cls(f"{path}@{row}")
