"""From logits to scores, thresholds and decisions: formulas, without a network."""
