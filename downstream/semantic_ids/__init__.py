"""Semantic ids: each item's vector as a few small numbers, which generative recommenders such as TIGER predict."""
