"""A tiny world with the shape of the real one: a text teacher, a vision-language base, problems in text and images."""
