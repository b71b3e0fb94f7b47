"""Sweeps: cells of a grid, a list or a search, their runs as processes, and the study that workers share."""

from wmtp.sweep.cells import Cell, SweepError
