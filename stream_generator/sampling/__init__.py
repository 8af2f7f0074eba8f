"""Logits to ids.

The one draw of the project, and all rows of a step at once. Knows requests and their parameters,
and nothing of models. Start with `sampler.draw`.
"""
