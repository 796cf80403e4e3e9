"""distill: few-step students from diffusion and flow teachers."""

__version__ = "0.1.0"
