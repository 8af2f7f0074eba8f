"""Whatever people have of a model, as a directory that transformers loads."""
