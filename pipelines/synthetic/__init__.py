"""What the demo and the tests run on: a drawn catalogue with known truth, and a small backbone that reads it."""
