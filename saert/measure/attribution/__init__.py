"""What each latent does to a metric, estimated from gradients."""
