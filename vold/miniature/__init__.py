"""A tiny world with the shape of the real one: text and image problems, a text teacher, a base student that sees."""
