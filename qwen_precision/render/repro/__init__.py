"""The script for a maintainer: which forward shows the finding, and the lines that make it."""
