"""The terminal table, a section a file."""
