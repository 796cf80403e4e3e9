"""From a config to a trained run: experiment, trainer, placements, checkpoints, validation, loggers."""
