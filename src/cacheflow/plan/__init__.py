"""The pure core: grids, costs, bounds, plans and the state machine that executes them. No clock, no I/O, no torch."""
