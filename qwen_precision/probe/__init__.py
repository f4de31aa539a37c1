"""A checkpoint measured: all dtypes through the layers together."""
