"""Loads a model from a directory, a GGUF file, the hub, or the demo model's package.

Does not know the engine. Start with `load.load_checkpoint`.
"""
