"""Messages to ids, and ids to text.

Chat templates and their guard against forged turns, the detokenizer, stop strings. No torch, and
nothing of models or requests. Start with `detokenizer`.
"""
