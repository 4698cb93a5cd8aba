"""Fine-tuning: samples, losses, methods, the trainer, and the measurements made while it runs."""
