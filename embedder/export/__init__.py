"""From a dataset to an embeddings folder: plan, shards, workers, reused rows, and the final check."""
