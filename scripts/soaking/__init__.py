"""What ``soak.py`` does without end, one step after the other: calls of a layer, or training steps of its experts."""
