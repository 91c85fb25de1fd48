"""LGD: HER2 scoring from H&E alone, taught to hallucinate the latents of a frozen IHC teacher."""

__version__ = "0.1.0"
