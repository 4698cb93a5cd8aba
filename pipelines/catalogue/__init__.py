"""Reads items, interactions, images and vectors in many formats; writes a dataset folder."""
