"""Whatever people have of a model, and how it is loaded.

A directory, a hub id, a GGUF file, Meta's own layout, or nothing: the demo model. Knows nothing of
the engine. Start with `load.load_checkpoint`.
"""
