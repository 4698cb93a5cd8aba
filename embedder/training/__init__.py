"""Fine-tuning: samples, losses, methods, the trainer, and what is watched while it runs."""
