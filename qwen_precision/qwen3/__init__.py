"""What is known of Qwen3: names of its operations, and which tensor takes which factor. No torch."""
