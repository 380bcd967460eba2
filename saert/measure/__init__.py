"""What an SAE is worth: effects of ablation, attribution, reconstruction, probes, explanations."""
