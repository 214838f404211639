"""Self-play: what a posed question is worth, who answers it, and the memory bank (R-Zero, R-Diverse)."""
