"""Fuse a pretrained and a fine-tuned checkpoint of one architecture (Model Tailor, arXiv 2402.12048)."""
