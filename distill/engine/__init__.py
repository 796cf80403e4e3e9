"""What a run needs besides the method: checkpoints, callbacks, the trainer."""
