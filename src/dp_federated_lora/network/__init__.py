"""A federation over a network: what each site allows, and what is written down about it."""
