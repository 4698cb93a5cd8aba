"""embedder writes a table: a vision-language model, fine-tuned on histories, turned into item vectors.

Nothing in here imports `vlm2rec.downstream` or `vlm2rec.pipelines`.
"""
