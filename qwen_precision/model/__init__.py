"""A checkpoint: found, checked, built without weights, its tensors read."""
