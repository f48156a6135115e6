"""Scoring completions under a model: log-probs per token, hidden states, and the batch layout."""
