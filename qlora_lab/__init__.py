"""QLoRA, from numbers to a trained model: the package behind the course's notebooks."""

__version__ = "0.1.0"
