"""From a chosen configuration to a trained model: full training, and what is done with its result."""
