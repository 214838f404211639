"""Self-play: rewards of posed questions, the solver's votes on them, and the memory bank (R-Zero, R-Diverse)."""
