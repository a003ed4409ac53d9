"""What turns gradients into weights: schedules, parameter groups, losses, the moving average."""
