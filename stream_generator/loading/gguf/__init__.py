"""Reads GGUF files: header, configuration, tokenizer and weights. Start with `file.GgufFile`."""
