"""Evaluation, re-ranking, query expansion."""
