"""From a dataset to an embeddings folder: plan, shards, workers, what is taken over from earlier, and the check."""
