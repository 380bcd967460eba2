"""Ablating latents one at a time, and what the model then predicts."""
