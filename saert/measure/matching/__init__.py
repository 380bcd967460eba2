"""How alike dictionaries are: matched latents of several runs or sizes."""
