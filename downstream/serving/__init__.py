"""Recommendations for any users: their vectors, and the first items of each, by vectors, an index, or a recommender."""
