"""The geometry of rank-r updates: pure functions on stacked tensors, no models, no state."""
