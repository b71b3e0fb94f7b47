"""Arithmetic that several rooms share: float32 products, keyed random numbers, intervals, places in packed rows."""
