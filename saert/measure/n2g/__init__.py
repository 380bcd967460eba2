"""Explaining latents by patterns of tokens (N2G)."""
