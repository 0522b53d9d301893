"""Benchmarks, prompts and scorers: turns rows into prompts and predictions into scores, without any model."""
