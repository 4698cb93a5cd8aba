"""Vision-language models from the outside: load one, add an adapter, run packed prompts through it."""
