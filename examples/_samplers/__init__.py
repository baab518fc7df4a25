"""What the two examples of path samplers share: experiments, how they are measured, and the figure."""
