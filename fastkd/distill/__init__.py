"""Distillation around any model: the distiller, its terms, taps and recipes. Needs torch alone."""
