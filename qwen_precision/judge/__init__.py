"""From a Run to findings, a verdict and an exit code. No torch."""
