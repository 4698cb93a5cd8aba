"""Vision-language models: load one, add an adapter, run packed prompts through it."""
