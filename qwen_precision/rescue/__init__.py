"""An exact rescaling: planned, proven, written, probed again."""
