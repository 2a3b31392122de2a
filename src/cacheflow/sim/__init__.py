"""The simulator: the planner, the state machine and the batch scheduler of live serving under a virtual clock."""
