"""Reading and writing: rows of features, images, files."""
