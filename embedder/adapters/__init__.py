"""Adapters: put one into a backbone, write its folder, load it strictly and fold it into the weights."""
