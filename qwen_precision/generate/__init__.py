"""Decoding with guards."""
