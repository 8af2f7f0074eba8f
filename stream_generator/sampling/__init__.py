"""Logits to ids, for all rows of a step at once.

Holds the project's only draw. Knows requests and their parameters, but not models. Start with
`sampler.draw`.
"""
