"""How good a trained classifier is on images it never saw."""
