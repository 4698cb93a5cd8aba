"""pipelines runs both: one module per command. Nothing imports this package."""
