"""GGUF files: the header, checked first; configuration, tokenizer and weights.

Knows no other layout. Start with `file.GgufFile`.
"""
