"""Data for the demo and the tests: a drawn catalogue with known truth, and a small backbone trained on it."""
