"""What the notebooks show: plots, widgets, exercise checks, and the workshop that builds the notebooks."""
