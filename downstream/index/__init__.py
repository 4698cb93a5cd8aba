"""FAISS over an embeddings folder: choose a kind, build, measure recall."""
