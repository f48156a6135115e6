"""Models: load them, hold other weights for them, their head, attention and memory."""
