"""The pack's version, written into every file it saves."""

__version__ = "0.2.0"
