"""Training: one adapter to transformers.Trainer, and the parts that are handed to it."""
