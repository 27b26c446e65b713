"""A gallery that lives: images come and go, queries come one at a time."""
