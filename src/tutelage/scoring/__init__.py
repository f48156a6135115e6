"""Scoring completions under a model: log-probs per token, hidden states, the layout a model takes."""
