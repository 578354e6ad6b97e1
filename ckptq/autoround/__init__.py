"""AutoRound of one decoder layer after the other, while calibration runs them."""
