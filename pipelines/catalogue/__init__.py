"""Reading what people have: items, interactions, images, vectors in many formats; writing a dataset folder."""
