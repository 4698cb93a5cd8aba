"""What the three packages hand to each other: names and schemas of folders, how they are read, how they appear whole.

`downstream` may import this package and nothing else of `embedder`. No torch in here.
"""
