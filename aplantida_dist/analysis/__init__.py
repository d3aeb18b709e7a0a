"""What a history says: curves from every kind of file, verdicts with evidence, plots, one page."""
