"""Every operation of a forward seen: where it ran and how large it was."""
