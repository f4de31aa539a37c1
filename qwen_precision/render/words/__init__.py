"""Sentences that several formats use."""
