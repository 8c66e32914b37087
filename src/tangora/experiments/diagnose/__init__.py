"""`tangora diagnose`: how much of the full gradient LoRA sees, for a model and data by name."""
