"""LGD: HER2 scoring from H&E alone, taught to hallucinate the latents of a frozen IHC teacher."""

import logging

# A program that imports lgd sees what it logs only where the program asks for it.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__version__ = "0.1.0"
