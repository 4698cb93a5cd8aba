"""Encoders of items: fine-tuned backbones, the VLM2Vec study's prompts, and frozen encoders."""
