"""Evaluation of vectors: ranking metrics, the protocol of both tasks, geometry, statistics."""
