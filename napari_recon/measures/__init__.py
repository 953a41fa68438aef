"""How good a volume is: against a reference, and without one. NumPy, SciPy and scikit-image; neither torch nor Qt."""
