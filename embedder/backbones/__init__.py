"""Vision-language models: load one, run packed prompts through it."""
