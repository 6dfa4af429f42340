"""Training: the losses, one loop for all of them, and the stages that use it."""
