"""The Run, as it is saved: facts only. No torch."""
