"""Few-shot classification of tones, with a network, a solver and an estimator of its own."""
