"""vold: train vision-language models to reason from text alone (VOLD, two stages)."""
