"""Grids of distillation experiments, their results, and the tables and figures made from them."""
