"""Attention over whole keys and values, with the maxima that calibration takes."""
