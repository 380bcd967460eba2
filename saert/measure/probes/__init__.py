"""What latents know: 1-D and k-sparse probes on labelled text."""
