"""What the command ``plan`` does: memory and time of a training step, predicted."""
