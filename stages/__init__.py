"""From photographs to a release in stages: what they do, when they run again, when they stop."""
