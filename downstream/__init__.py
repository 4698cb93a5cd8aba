"""downstream reads the table: ranking, geometry, RecBole, FAISS.

Needs no transformers. From `vlm2rec.embedder` it imports `schema`, `dataset` and `errors` only.
"""
