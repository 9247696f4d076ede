"""Cached cells on a real model: fine-tune the aligned model in one way, measure safety and utility, keep the result.
`python -m benchmarks.frontier`.
"""
