"""Families of stock networks: how each network is called, and how its prompts and first frames are encoded."""
