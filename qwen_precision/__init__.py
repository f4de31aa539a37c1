"""qprec: find where a Qwen3 checkpoint overflows in half precision, why, and how much headroom the rest has."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qwen_precision.watcher import watch

__all__ = ["__version__", "watch"]


def __getattr__(name: str) -> Any:
    # ``watch`` needs torch; reading a report does not, so it is imported when asked for.
    if name == "watch":
        from qwen_precision.watcher import watch

        return watch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
