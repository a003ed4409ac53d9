"""Training, evaluation, checkpoints and logging: one loop for every recipe."""
