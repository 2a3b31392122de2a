"""The state machine of restorations: which cell is claimed, by whom, and what each side does next. Pure."""
