"""From an item to its vectors: fine-tuned backbones, the study's prompts, frozen encoders."""
