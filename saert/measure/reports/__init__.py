"""How well an SAE reconstructs, and what the model loses with it: numbers and a page."""
