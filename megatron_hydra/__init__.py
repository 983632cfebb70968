"""Turn a pretrained transformer into a head-level hybrid of full and linear attention."""

__version__ = "0.1.0"
