"""What the three packages share: names and schemas of folders, how they are read, and how they are written whole.

`downstream` may import this package and nothing else of `embedder`. No torch in here.
"""
