"""What can be asked for: profiles, flags, guards, prompts. No torch."""
