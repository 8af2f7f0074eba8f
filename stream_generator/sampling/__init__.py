"""Logits to ids, for all rows of a step at once.

Only this package draws ids at random. Knows requests and their parameters, but not models. Start
with `sampler.draw`.
"""
