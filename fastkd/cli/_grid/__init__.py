"""Grids of runs: rows of settings × seeds, trained side by side, one line of results per run and split."""
