"""Messages to ids, and ids to text.

Holds chat templates and their guard against forged turns, the detokenizer and stop strings. Does
not import torch, and knows nothing of models or requests. Start with `detokenizer`.
"""
