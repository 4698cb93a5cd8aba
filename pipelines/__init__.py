"""pipelines runs embedder and downstream: one module per command. Neither of them imports this package."""
