"""The version: the wheel is built from it, every record takes it. It imports nothing, so everybody may read it."""

__version__ = "0.1.0"
