"""Measurements with a verdict or a table of their own: accuracy, faults, kills, processes, input, plans."""
