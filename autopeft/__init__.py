"""Search and benchmark parameter-efficient fine-tuning inside a budget of device time."""

__version__ = "0.1.0"
